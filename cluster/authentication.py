"""Whether a Ray cluster answers, whether it asks for a token, and which token this user has.

Since 2.52 a Ray cluster can ask for a token, and newer ones do so unless told otherwise. Ray's own client goes by
RAY_AUTH_MODE, which must agree with the cluster. Where that is not set and a cluster is named it sends none, tries for
half a minute, and says that it failed to connect. So the cluster is asked first, by a call that takes milliseconds.
"""

from __future__ import annotations

import enum
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
DEFAULT_PATH = "~/.ray/auth_token"
TLS = "RAY_USE_TLS"
HOW_TO_GIVE_ONE = f"give the cluster's token in {TOKEN}, in a file named by {TOKEN_PATH}, or in {DEFAULT_PATH}"
ASK_S, TRIES = 4.0, 2
CLUSTER_ID = "/ray.rpc.NodeInfoGcsService/GetClusterId", b""  # of the GCS, which holds a cluster together
PING = "/ray.rpc.RayletDriver/ClusterInfo", b"\x08\x06"  # of the server for ray:// addresses: type = PING


class Answer(enum.Enum):
    WELCOME = enum.auto()
    REFUSED = enum.auto()  # without a token, or with another than its own
    NONE = enum.auto()  # nothing answers


class RefusedError(RuntimeError):
    """A cluster asks for a token that this user has not, said in a line."""


@dataclass(frozen=True)
class Token:
    where: str
    value: str = field(repr=False)

    def refused(self) -> RefusedError:
        return RefusedError(f"it refuses the token from {self.where}: {HOW_TO_GIVE_ONE}")


def find_token() -> Token | None:
    """The token that Ray would use here. Raises `RefusedError` where a file that was named cannot be read."""
    if value := os.environ.get(TOKEN, "").strip():
        return _checked(Token(TOKEN, value))
    named = os.environ.get(TOKEN_PATH)
    try:
        file = Path(named or DEFAULT_PATH).expanduser()
        value = file.read_text(encoding="utf-8").strip()
    except (OSError, RuntimeError, UnicodeDecodeError) as error:
        if named:
            raise RefusedError(f"the token in {TOKEN_PATH} {named} cannot be read: {type(error).__name__}") from None
        return None
    return _checked(Token(str(file), value)) if value else None


def needed_token() -> Token:
    """As `find_token`, of a cluster that asks for one. Raises `RefusedError` also where there is none."""
    token = find_token()
    if token is None:
        raise RefusedError(f"it asks for a token, and none was found: {HOW_TO_GIVE_ONE}")
    return token


def _checked(token: Token) -> Token:
    if not all("!" <= letter <= "~" for letter in token.value):
        raise RefusedError(f"what is in {token.where} is no token: one line of letters and digits is")
    return token


def ask(place: str, token: Token | None, client: bool = False) -> Answer:
    """What the cluster at `place`, host:port, answers to who has this token. `client`: it is a ray:// address."""
    import grpc  # which takes a tenth of a second

    sent = [("authorization", f"Bearer {token.value}")] if token else []
    code = grpc.StatusCode
    answers = {
        code.UNAUTHENTICATED: Answer.REFUSED,
        code.PERMISSION_DENIED: Answer.REFUSED,
        code.UNAVAILABLE: Answer.NONE,
    }
    with grpc.insecure_channel(place, [("grpc.enable_http_proxy", 0)]) as channel:
        method, request = PING if client else CLUSTER_ID
        call = channel.unary_unary(method)
        for _ in range(TRIES):
            try:
                call(request, timeout=ASK_S, metadata=sent)
            except grpc.RpcError as error:
                if error.code() is not code.DEADLINE_EXCEEDED:  # it may be busy
                    return answers.get(error.code(), Answer.WELCOME)  # a Ray of another version may not know the call
            else:
                return Answer.WELCOME
    return Answer.NONE


def variables_to_join(place: str, client: bool = False) -> dict[str, str] | None:
    """The environment that Ray needs to join the cluster at `place`; None where no Ray answers.

    Where Ray is told to use TLS, it is not asked, and Ray goes by its own variables.
    Raises `RefusedError` where it asks for a token that is not here.
    """
    if os.environ.get(TLS, "0").lower() not in ("", "0", "false"):
        return {}
    answer = ask(place, None, client)
    if answer is Answer.NONE:
        return None
    if answer is Answer.WELCOME:
        return {MODE: "disabled"}
    token = needed_token()
    answer = ask(place, token, client)
    if answer is Answer.REFUSED:
        raise token.refused()
    return None if answer is Answer.NONE else {MODE: "token", TOKEN: token.value}


def variables_to_start() -> dict[str, str]:
    """The environment for a Ray of one's own, which asks for a token that no one else knows, unless told otherwise.

    Left to itself, Ray would write one to the user's home, where clusters started later would take it from.
    """
    if os.environ.get(MODE, "token") != "token":
        return {}
    return {MODE: "token", TOKEN: secrets.token_hex(32)}


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Have Ray see these variables, in this process and in those that it starts, for a while."""
    before = {name: os.environ.get(name) for name in (MODE, TOKEN)}
    _set_variables(variables)
    try:
        yield
    finally:
        _set_variables(before)


def _set_variables(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    raylet = sys.modules.get("ray._raylet")
    if raylet:  # it has read them already
        with suppress(AttributeError):  # Rays that know no tokens
            raylet.Config.initialize("")
            raylet.AuthenticationTokenLoader.instance().reset_cache()
