"""Hostile input: nothing of it is run, leaves its folder, or becomes a part of a page; secrets stay where they are."""

import json
import pickle
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.browser import in_browser, needs_browser
from helpers.checkpoints import save_bin
from helpers.command_line import ForkedCommand, run_dir_of

TINY = ("--trainer.max_steps=4", "--data.batch_size=8", "--model.n_instances=2", "--report=false")
PLAIN = (*TINY, "--trainer.logger=false")
EVIL = "</script><img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"


class MakesAFile:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "work"
    folder.mkdir()
    command = ForkedCommand(folder)
    return run_dir_of(command("fit", "--run_dir=run", *PLAIN), command)


def is_one_line(result):
    lines = result.stderr.strip().splitlines()
    return result.returncode == 2 and len(lines) == 1 and not result.stdout


# ---- pickles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["pickle", "torch", "numpy"])
@pytest.mark.parametrize("ending", [".ckpt", ".npy", ".safetensors"])
def test_a_pickle_is_never_run(typed, command, injected, how, ending):
    canary, path = command.folder / "canary", command.folder / f"file{ending}"
    if how == "pickle":
        path.write_bytes(pickle.dumps(MakesAFile(canary)))
    elif how == "torch":
        with path.open("wb") as file:
            torch.save({"state_dict": MakesAFile(canary), "global_step": 1}, file)
    else:
        with path.open("wb") as file:
            np.save(file, np.array([MakesAFile(canary)], dtype=object), allow_pickle=True)
    options = {
        ".ckpt": [("fit", "--ckpt_path"), ("test", "--ckpt_path"), ("validate", "--ckpt_path")],
        ".npy": [("fit", "--model.init_features")],
        ".safetensors": [("fit", "--model.init_features"), ("fit", "--model.init_head")],
    }
    before = sorted(command.folder.rglob("*"))
    for name, option in options[ending]:
        result = typed(name, f"{option}={path.name}", *PLAIN)
        wrong = not is_one_line(result) or canary.exists() or sorted(command.folder.rglob("*")) != before
        injected(f"pickle as {ending}", wrong=wrong, message=result.stderr, what=result.stderr)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_of_a_language_model_is_never_run(forked, injected, is_zip):
    canary = forked.folder / "canary"
    prompt = {"text": "mary went to the store", "key": "mary", "correct": "john", "wrong": "mary"}
    (forked.folder / "prompts.jsonl").write_text(json.dumps(prompt))
    source = "--data.source=svf_lightning.replay.FolderCheckpoints"
    save_bin(forked.folder / "model")
    path = forked.folder / "model" / "pytorch_model.bin"
    arguments = (
        source,
        "--data.source.init_args.folder=model",
        "--data.prompts=prompts.jsonl",
        "--trainer.logger=false",
    )
    assert forked("replay", *arguments, "--run_dir=good", "--report=false").returncode == 0
    torch.save({"gpt_neox.embed_in.weight": MakesAFile(canary)}, path, _use_new_zipfile_serialization=is_zip)
    result = forked("replay", *arguments, "--run_dir=bad")
    wrong = result.returncode == 0 or canary.exists() or "Traceback" in result.stderr
    injected("pickle as .bin", wrong=wrong, what=f"{result.returncode} {result.stderr} {result.stdout}")


# ---- names and links -------------------------------------------------------------------------------------------------


RUN_DIRS = {
    "a name that is too long": "n" * 300,
    "a line break": "a\nb",
    "a control character": "a\x1b[2Jb",
    "a null byte": "a\0b",
    "below a file": "file/run",
    "a file": "file",
    "a link to nowhere": "to_nowhere",
    "a link to itself": "to_itself",
    "below a link to itself": "to_itself/run",
    "a device": "/dev/null",
    "below a device": "/dev/null/run",
}


@pytest.mark.parametrize("case", RUN_DIRS)
def test_a_run_directory_that_cannot_be_is_one_line(forked, typed, injected, case):
    (forked.folder / "file").write_text("")
    (forked.folder / "to_nowhere").symlink_to("nowhere")
    (forked.folder / "to_itself").symlink_to("to_itself")
    before = sorted(forked.folder.rglob("*"))
    for arguments in (("fit", *PLAIN), ("replay",)):
        result = typed(*arguments, f"--run_dir={RUN_DIRS[case]}")
        wrong = not is_one_line(result) or sorted(forked.folder.rglob("*")) != before
        injected("--run_dir that cannot be", wrong=wrong, message=result.stderr, what=f"{arguments} {result.stderr}")
    for name in ("report", "publish", "figures"):
        result = typed(name, RUN_DIRS[case], *(["images", "--format=csv"] if name == "figures" else []))
        wrong = not is_one_line(result) or sorted(forked.folder.rglob("*")) != before
        injected("run directory that cannot be, to read", wrong=wrong, message=result.stderr, what=result.stderr)


def test_a_name_never_leaves_the_folder_of_the_runs(typed, command, injected):
    for name in ("..", "../out", "/tmp/out", "a/../../out", ".", "a/b", "", " ", "a\n", "\x1b[2J", "n" * 61, "\\a"):
        before = sorted(command.folder.parent.rglob("*"))
        result = typed("fit", f"--experiment.name={name}", *PLAIN)
        wrong = not is_one_line(result) or sorted(command.folder.parent.rglob("*")) != before
        injected("experiment.name that is no folder's", wrong=wrong, message=result.stderr, what=f"{name!r}")


@pytest.mark.parametrize("name", ["with spaces", "äöü", "<img onerror=x>", "a:b;c,d#e?f'g", "-dash", "n" * 200, "..x"])
def test_a_run_directory_of_any_other_name_is_a_run(forked, injected, name):
    result = forked("fit", f"--run_dir={name}", *TINY, "--trainer.logger.init_args.log_media=false")
    wandb_runs = list((forked.folder / name / "wandb").glob("offline-run-*/*.wandb"))
    wrong = result.returncode != 0 or len(wandb_runs) != 1 or result.stdout.strip().splitlines()[-1] != name
    injected("run directory with an unusual name", wrong=wrong, what=result.stderr)
    result = forked("publish", f"./{name}", "--media=false")
    wandb_runs = list((forked.folder / name / "wandb").glob("offline-run-*/*.wandb"))
    injected("publish of a run with an unusual name", wrong=result.returncode != 0 or len(wandb_runs) != 1)


def test_links_to_a_run_and_to_its_trajectory_are_followed(finished, forked, injected):
    shutil.copytree(finished, forked.folder / "run")
    shutil.move(forked.folder / "run" / "trajectory.zarr", forked.folder / "elsewhere")
    (forked.folder / "run" / "trajectory.zarr").symlink_to("../elsewhere")
    (forked.folder / "link").symlink_to("run")
    result = forked("figures", "link", "images", "fig_2a", "--format=csv")
    wrong = result.returncode != 0 or not (forked.folder / "images" / "fig_2a.csv").is_file()
    injected("links to a run and to its trajectory", wrong=wrong, what=result.stderr)


# ---- secrets ---------------------------------------------------------------------------------------------------------


SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "canary-of-hugging-face",
    "AWS_SECRET_ACCESS_KEY": "canary-of-amazon",
    "MY_PASSWORD": "canary-of-mine",
}


def holding(folder, secret):
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_secrets_in_the_environment_are_in_no_file(forked, injected):
    run_dir = run_dir_of(forked("fit", *TINY[:3], WANDB_MODE="offline", **SECRETS), forked)
    assert (run_dir / "report.html").is_file()
    assert list((run_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert forked("publish", run_dir, WANDB_MODE="offline", **SECRETS).returncode == 0
    for name, secret in SECRETS.items():
        files = holding(run_dir, secret)
        injected("secret in the environment", wrong=bool(files), what=f"{name} in {files}")


# ---- pages -----------------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """Names of a page's elements, and attributes that would run something."""

    def __init__(self):
        super().__init__()
        self.names, self.active = [], []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.active += [
            (tag, name, value) for name, value in attrs if name.startswith("on") or "javascript:" in (value or "")
        ]


def elements(page):
    parser = Elements()
    parser.feed(page.read_text())
    return parser


def with_evil_strings(run_dir):
    """EVIL in every string of a run that reaches a page."""

    def everywhere(value):
        if isinstance(value, dict):
            return {name: everywhere(part) for name, part in value.items()}
        if isinstance(value, list):
            return [everywhere(part) for part in value]
        return f"{value}{EVIL}" if isinstance(value, str) else value

    summary = json.loads((run_dir / "summary.json").read_text())
    summary |= {name: everywhere(summary[name]) for name in ("experiment", "claims", "versions", "metrics")}
    (run_dir / "summary.json").write_text(json.dumps(summary))
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["experiment"] = dict.fromkeys(("shows", "figures"), EVIL) | {"tags": [EVIL], "claims": []}
    config["model"] = everywhere(config["model"])
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    store = run_dir / "trajectory.zarr"
    attributes = json.loads((store / ".zattrs").read_text())
    quantities = json.loads(attributes["quantities"])
    for quantity in quantities:
        for field in ("label", "meaning", "unit", "symbol", "source"):
            quantity[field] = f"{quantity.get(field, '')}{EVIL}"
    attributes["quantities"] = json.dumps(quantities)
    (store / ".zattrs").write_text(json.dumps(attributes))
    consolidated = json.loads((store / ".zmetadata").read_text())
    consolidated["metadata"][".zattrs"] = attributes
    (store / ".zmetadata").write_text(json.dumps(consolidated))


@pytest.fixture
def evil_pages(finished, forked):
    plain = shutil.copytree(finished, forked.folder / "plain")
    evil = shutil.copytree(finished, forked.folder / f"evil {EVIL.replace('/', '')}")
    with_evil_strings(evil)
    pages = {}
    for kind, arguments in {"plain": (plain,), "run": (evil,), "comparison": (evil, plain)}.items():
        result = forked("report", *arguments, f"--out={kind}.html")
        assert result.returncode == 0, result.stderr
        pages[kind] = forked.folder / f"{kind}.html"
    return pages


def test_no_string_of_a_run_becomes_a_part_of_its_page(evil_pages, injected):
    plain = elements(evil_pages["plain"])
    for kind in ("run", "comparison"):
        page = elements(evil_pages[kind])
        assert "onerror" in evil_pages[kind].read_text()  # the strings are there
        wrong = bool(page.active) or "img" in page.names
        wrong = wrong or (kind == "run" and page.names.count("script") != plain.names.count("script"))
        injected("markup in every string of a page", wrong=wrong, what=f"{kind} {page.active}")


@needs_browser
def test_a_browser_runs_no_string_of_a_run(evil_pages, injected):
    for kind in ("run", "comparison"):
        (title, images), errors = in_browser(
            evil_pages[kind], "document.title", "document.querySelectorAll('img, [onerror]').length"
        )
        injected("markup in every string of a page, in a browser", wrong=title == "broken" or images or errors != [])
