"""What an error says in full, and what of it nobody is to read."""

import pytest

from cluster.tracebacks import describe, scrubbed, traceback_of

SECRETS = {
    "MY_SERVICE_TOKEN": "tok-of-mine-123456",
    "DB_PASSWORD": "hunter2hunter2",
    "SOME_API_KEY": "k3y-k3y-k3y-k3y",
}


@pytest.fixture
def environment(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/home/me/token-file")
    monkeypatch.setenv("SHORT_TOKEN", "on")


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("refused tok-of-mine-123456 for hunter2hunter2", "refused *** for ***"),
        ("https://b.net/k?X-Amz-Signature=abc123&X-Amz-Expires=60", "https://b.net/k?X-Amz-Signature=***&X-Amz-Expires=60"),
        ("{'aws_secret_access_key': 'wJalrX', 'region': 'eu'}", "{'aws_secret_access_key': '***', 'region': 'eu'}"),
        ("Authorization: Bearer eyJhbGciOiJI.x", "Authorization: Bearer ***"),
        ("password=hunter3hunter3, aws_secret_access_key = wJalrXUtnFEMI", "password=***, aws_secret_access_key = ***"),
        ("https://c/f?Policy=a&Signature=x-y&Key-Pair-Id=K", "https://c/f?Policy=***&Signature=***&Key-Pair-Id=***"),
        ("a basic attention block, token = find_token(place)", "a basic attention block, token = find_token(place)"),
        ("AKIAABCDEFGHIJKLMNOP and hf_abcdefghijklmnopqrst", "*** and ***"),
        ("http://me:pw@host:9000/bucket", "http://***@host:9000/bucket"),
        ("/home/me/token-file, tokenizer='word'", "/home/me/token-file, tokenizer='word'"),
        ("a plain error: 3 of 4, see https://host/page", "a plain error: 3 of 4, see https://host/page"),
    ],
)  # fmt: skip
def test_secrets_are_hidden_and_the_rest_stays(text, shown):
    assert scrubbed(text) == shown
    assert describe(ValueError(text)) == f"ValueError: {shown}"


def raised(text):
    try:
        raise LookupError(text)
    except LookupError as error:
        return error


def test_a_secret_is_hidden_also_where_a_line_is_cut(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hunterhunterhunter12345")
    assert "hunter" not in describe(ValueError("x" * 970 + " hunterhunterhunter12345"))


@pytest.mark.usefixtures("environment")
def test_errors_of_one_type_from_one_place_are_one_kind():
    one, other = (traceback_of(raised(text), "shard", " 7", "worker-0001") for text in ("a", "hunter2hunter2"))
    assert one.kind == other.kind
    assert one.kind.startswith("shard-LookupError-")
    assert one.kind != traceback_of(raised("a"), "set-up", "", "worker-0001").kind
    assert other.line == "LookupError: ***"
    assert "hunter2hunter2" not in other.text
    assert "worker-0001  shard 7" in one.text
    assert "raise LookupError(text)" in one.text
