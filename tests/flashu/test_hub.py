"""Loading by hub id: the real hub client, in processes of their own, against a small hub on 127.0.0.1."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from tests import fakes

TOKEN = "hf_NeverToBeShownNeverToBeShown"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

MODEL, PICKLED_MODEL = "showlab-fake/small", "showlab-fake/small-bin"
VARIANTS = "showlab-fake/small-variants"  # which has no plain weights, and two variants
LLM = "qwen-fake/small-instruct"
SLOW_LLM, SLOW_MODEL = "qwen-fake/slow-words", "showlab-fake/small-slow-words"  # without tokenizer.json, and its model
WAN = "Wan-AI/Wan2.1-T2V-14B"  # where the released VAE is looked for when no --vae is given

REFUSALS = {  # repository: status, X-Error-Code, X-Error-Message, as the hub has them
    "fake/absent": (404, "RepoNotFound", "Repository not found"),
    "fake/gated": (403, "GatedRepo", "Access to model fake/gated is restricted and you are not in the list"),
    "fake/expired-token": (401, "", "Invalid credentials in Authorization header"),
    "fake/overloaded": (503, "", ""),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub with a model in both formats, one in pickle only, their LLM, and the video model that has the VAE; and a
    model whose LLM has its tokenizer in another layout."""
    folder = tmp_path_factory.mktemp("hub")
    both = fakes.write_showo2(folder / "both", layout="bin", llm=LLM)
    fakes.write_weights(both, fakes.weights(), "safetensors")
    for name in ("model.fp16.safetensors", "pytorch_model.bf16.bin"):
        (both / name).write_bytes(b"a variant that nobody asked for")
    pickled = fakes.write_showo2(folder / "pickled", layout="sharded bin", llm=LLM)
    variants = fakes.write_showo2(folder / "variants", layout="variant bin", llm=LLM)
    (variants / "pytorch_model.fp16.bin").write_bytes(b"another")
    llm = folder / "llm"
    fakes.write_llm_folder(llm)
    (llm / "model.safetensors").write_bytes(b"gigabytes that nobody needs")
    slow_model = fakes.write_showo2(folder / "slow", layout="safetensors", llm=SLOW_LLM)
    slow_llm = folder / "slow-llm"
    fakes.write_llm_folder(slow_llm)
    (slow_llm / "tokenizer.json").unlink()
    fakes.write_slow_tokenizer(slow_llm, fakes.small_vocabulary(), fakes.MERGES)
    (slow_llm / "model.safetensors").write_bytes(b"gigabytes that nobody needs")
    wan = folder / "wan"
    (wan / "google" / "umt5-xxl").mkdir(parents=True)
    fakes.write_released_vae(wan / fakes.VAE_FILE)
    (wan / "config.json").write_text('{"_class_name": "WanModel", "dim": 5120}')
    for name in (
        "diffusion_pytorch_model-00001-of-00006.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
        "models_t5_umt5-xxl-enc-bf16.pth",
        "google/umt5-xxl/tokenizer.json",
    ):
        (wan / name).write_bytes(b"gigabytes that nobody needs")
    models = {MODEL: both, PICKLED_MODEL: pickled, VARIANTS: variants, SLOW_MODEL: slow_model}
    with Hub({**models, LLM: llm, SLOW_LLM: slow_llm, WAN: wan}) as hub:
        yield hub


class Hub:
    """Serves folders as repositories, and remembers which files were fetched and which tokens were sent."""

    def __init__(self, repositories):
        self.repositories = repositories
        self.fetched = set()  # "id/file"
        self.tokens = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=[0.01], daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request):
        self.tokens.add(request.headers["Authorization"])
        path = request.path.partition("?")[0].strip("/")
        is_api = path.startswith("api/models/")
        owner, name, *rest = path.removeprefix("api/models/").split("/")
        repository = f"{owner}/{name}"
        if repository not in self.repositories:
            status, code, message = REFUSALS.get(repository, REFUSALS["fake/absent"])
            _send(request, status, {"X-Error-Code": code, "X-Error-Message": message})
        elif is_api:
            _send(request, 200, {}, json.dumps(self.describe(repository, rest[0] if rest else "")).encode())
        else:  # resolve/COMMIT/FILE
            self.serve(request, repository, "/".join(rest[2:]))

    def describe(self, repository, what):
        folder = self.repositories[repository]
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        if what == "tree":
            return [
                {
                    "type": "file",
                    "path": file.relative_to(folder).as_posix(),
                    "size": file.stat().st_size,
                    "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
                }
                for file in files
            ]
        return {
            "id": repository,
            "sha": COMMIT,
            "siblings": [{"rfilename": file.relative_to(folder).as_posix()} for file in files],
        }

    def serve(self, request, repository, name):
        body = (self.repositories[repository] / name).read_bytes()
        if request.command == "GET":
            self.fetched.add(f"{repository}/{name}")
        etag = hashlib.sha1(body).hexdigest()
        _send(request, 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, body)


def _send(request, status, headers, body=b""):
    request.send_response(status)
    for key, value in {**headers, "Content-Length": len(body)}.items():
        request.send_header(key, value)
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(body)


COMMANDS = """
import sys
from jobs.cli.main import main

for command in sys.argv[1:]:
    sys.argv = ["flashu", "generate", "a red circle", "--steps", "3", "--device", "cpu", *command.split("\\t")]
    try:
        main()
    except SystemExit as end:
        print("exit", end.code or 0)
    for stream in (sys.stdout, sys.stderr):
        print(end="\\f", file=stream, flush=True)
"""


class Session:
    """`flashu generate --model ID` for several ids, in one process that knows the hub by `endpoint` alone."""

    def __init__(self, folder, endpoint, models, **environment):
        self.models = models
        self.pictures = [folder / f"{index}.png" for index in range(len(models))]
        commands = [f"--model\t{model}\t-o\t{picture}" for model, picture in zip(models, self.pictures, strict=True)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMANDS, *commands],
            env={
                **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
                "HF_ENDPOINT": endpoint,
                "HF_HOME": str(folder / "home"),
                "HF_HUB_DISABLE_XET": "1",
                "HF_TOKEN": TOKEN,
                "NO_PROXY": "127.0.0.1",
                "OMP_NUM_THREADS": "1",  # several of them run side by side
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait(self):
        """What became of each model."""
        out, err = self.process.communicate(timeout=200)
        runs = zip(self.models, out.split("\f"), err.split("\f"), self.pictures, strict=False)
        return {model: Run(out, err, picture) for model, out, err, picture in runs}


@dataclass
class Run:
    out: str
    err: str
    picture: Path

    @property
    def code(self):
        return int(self.out.rpartition("exit ")[2])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder whose home/ has a cache."""
    return tmp_path_factory.mktemp("first")


@pytest.fixture(scope="module")
def first_runs(hub, home):
    """With an empty cache, and first the model that has both formats."""
    return Session(home, hub.url, [MODEL, PICKLED_MODEL, SLOW_MODEL, VARIANTS, *REFUSALS]).wait()


@pytest.fixture(scope="module")
def first_run(first_runs):
    return first_runs[MODEL]


@pytest.fixture(scope="module")
def runs(first_runs, home, hub, tmp_path_factory):
    """Of three sessions: the first, and side by side two with its cache and no hub."""
    with Hub({}) as gone:
        dead_endpoint = gone.url
    cached = {"HF_HOME": str(home / "home")}
    folders = [tmp_path_factory.mktemp("later") for _ in range(2)]
    later = {
        "hub gone": Session(folders[0], dead_endpoint, [MODEL, "fake/unreachable"], **cached),
        "HF_HUB_OFFLINE": Session(folders[1], hub.url, [MODEL], HF_HUB_OFFLINE="1", **cached),
    }
    return {"hub there": first_runs, **{name: occasion.wait() for name, occasion in later.items()}}


def test_a_hub_id_is_all_that_a_picture_needs(first_run):
    assert first_run.code == 0, first_run.err
    assert Image.open(first_run.picture).size == (64, 64)


def test_of_two_formats_and_their_variants_only_plain_safetensors_are_fetched(first_run, hub):
    assert fetched(hub, MODEL) == {"config.json", "model.safetensors"}


def test_the_llm_named_by_the_config_gives_geometry_and_tokenizer_and_no_weights(first_run, hub):
    assert fetched(hub, LLM) == {"config.json", "tokenizer.json"}


def test_only_the_vae_is_fetched_from_the_video_model(first_run, hub):
    assert fetched(hub, WAN) - {"config.json"} == {fakes.VAE_FILE}


def fetched(hub, repository):
    return {name.removeprefix(f"{repository}/") for name in hub.fetched if name.startswith(f"{repository}/")}


def test_the_token_goes_to_the_hub_and_is_never_shown(first_run, hub):
    assert f"Bearer {TOKEN}" in hub.tokens
    assert TOKEN not in first_run.out + first_run.err


@pytest.mark.parametrize("occasion", ["hub gone", "HF_HUB_OFFLINE"])
def test_a_second_run_needs_no_hub(first_run, runs, occasion):
    run = runs[occasion][MODEL]
    assert run.code == 0, run.err
    assert run.picture.read_bytes() == first_run.picture.read_bytes()


def test_a_repository_with_pickles_only_is_fetched_as_it_is(first_runs, first_run, hub):
    run = first_runs[PICKLED_MODEL]
    assert run.code == 0, run.err
    assert run.picture.read_bytes() == first_run.picture.read_bytes()
    assert "diffusion_pytorch_model.bin.index.json" in fetched(hub, PICKLED_MODEL)


def test_an_llm_without_tokenizer_json_gives_its_vocabulary_and_its_merges(first_runs, first_run, hub):
    run = first_runs[SLOW_MODEL]
    assert run.code == 0, run.err
    assert run.picture.read_bytes() == first_run.picture.read_bytes()
    added = {"tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"}
    assert fetched(hub, SLOW_LLM) == {"config.json", "vocab.json", "merges.txt", *added}


def test_of_a_repository_without_plain_weights_none_is_fetched_before_one_is_chosen(first_runs, hub):
    run = first_runs[VARIANTS]
    assert run.code == 2
    assert run.err == f"flashu: {VARIANTS} holds its weights in variants only: bf16, fp16. Choose one with variant=\n"
    assert fetched(hub, VARIANTS) == set()


@pytest.mark.parametrize(
    ("occasion", "name", "reason"),
    [
        ("hub there", "fake/absent", "no such repository"),
        ("hub there", "fake/gated", "access"),
        ("hub there", "fake/expired-token", "log in"),
        ("hub there", "fake/overloaded", "cannot be reached"),
        ("hub gone", "fake/unreachable", "cannot be reached"),
    ],
)
def test_a_hub_that_will_not_serve_is_told_in_one_line(runs, occasion, name, reason):
    run = runs[occasion][name]
    assert run.code == 2
    assert run.err.count("\n") == 1, run.err
    assert run.err.startswith(f"flashu: {name!r}")
    assert reason in run.err
    assert TOKEN not in run.out + run.err
    assert not run.picture.exists()
