"""The console script: help is there at once, every sub-command works, and errors are one sentence with a status."""

import json
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint, distribution
from importlib.util import find_spec
from pathlib import Path

import pytest

import dsa
import small
from dsa import cli
from dsa.datasets import token_ids
from project import DATA, ROOT

GROUPS = {name: entry for name, entry in cli.DSA.commands.items() if isinstance(entry, cli.Group)}
COMMANDS = {
    **{name: entry for name, entry in cli.DSA.commands.items() if name not in GROUPS},
    **{f"{name} {word}": entry for name, group in GROUPS.items() for word, entry in group.commands.items()},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A dense model that reads bytes, and a text."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "texts").write_text(small.LINES)
    dense = small.config(**small.DENSE, vocab_size=305, num_hidden_layers=2)
    dsa.save_pretrained(small.model(sizes=dense), folder / "dense")
    return folder


@pytest.fixture
def run(home, monkeypatch, capsys):
    """Run a command line in `home`: exit status, output, error stream."""
    monkeypatch.chdir(home)

    def run(line):
        try:
            cli.main(line.split())
            status = 0
        except SystemExit as ended:
            if isinstance(ended.code, str):  # as the interpreter does it
                print(ended.code, file=sys.stderr)
            status = 1 if isinstance(ended.code, str) else int(ended.code or 0)
        return status, *capsys.readouterr()

    return run


def test_help_lists_every_sub_command_with_a_line(run):
    status, alone, _ = run("")
    assert status == 0 and run("--help") == run("-h") == (0, alone, "")
    assert [line.split()[0] for line in alone.splitlines() if line.startswith("  ")] == list(cli.DSA.commands)
    assert {"inspect", "generate", "chat", "adopt", "eval", "train", "bench"} == set(cli.DSA.commands)
    for name, group in GROUPS.items():
        assert run(name) == run(f"{name} --help")
        assert all(f"  {word} " in run(name)[1] for word in group.commands)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_sub_command_explains_its_options(command, run):
    status, text, _ = run(f"{command} --help")
    assert status == 0 and text.startswith(f"usage: dsa {command} ") and "--help" in text
    assert find_spec(COMMANDS[command].module)  # which can be started by itself


@pytest.mark.parametrize("words", [[], ["--help"], ["train"], ["bench", "--help"], ["nonsense"]], ids=" ".join)
def test_who_asks_what_there_is_does_not_wait_for_torch(words):
    program = f"import sys; from dsa.cli import main\ntry: main({words})\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_python_m_dsa_is_the_same(run):
    done = subprocess.run([sys.executable, "-m", "dsa", "bench"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == run("bench")


def test_the_console_script_is_declared():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    assert EntryPoint("dsa", scripts["dsa"], "console_scripts").load() is cli.main


def installed_from():
    """The folder that `pip install -e` was given."""
    url = json.loads(distribution("dsa").read_text("direct_url.json") or "{}").get("url", "")
    return Path(url.removeprefix("file://"))


@pytest.mark.skipif(installed_from() != ROOT, reason="what is installed is another checkout")
def test_the_console_script_is_installed():
    done = subprocess.run([Path(sys.executable).with_name("dsa"), "train"], capture_output=True, text=True)
    assert done.returncode == 0 and "pretrain" in done.stdout


def test_inspect(run):
    status, text, _ = run("inspect dense")
    assert status == 0 and "2 layers, dense, context 128" in text and text.endswith("it will load\n")


def test_generate(run):
    status, text, _ = run("generate dense --prompt line --max-new-tokens 3 --device cpu")
    assert status == 0 and text.startswith("line")


def test_chat(run, monkeypatch):
    lines = iter(["line", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert run(f"chat {DATA / 'sparse'} --max-new-tokens 3 --device cpu")[0] == 0


def test_adopt_then_train_the_indexer_on_and_eval(run, home):
    sizes = "--length 32 --batch 2 --index-heads 4 --index-head-dim 16 --top-k 4 --corpus texts"
    status, text, _ = run(f"adopt dense --out adopted --steps 2 {sizes}")
    assert status == 0 and "made adopted" in text and "attention mass kept, oracle" in text
    found = json.loads((home / "adopted" / "provenance.json").read_text())
    assert found["command"] == f"dsa adopt dense --out adopted --steps 2 {sizes}"
    assert dsa.from_pretrained(home / "adopted").config.index_n_heads == 4
    again = "--length 32 --batch 2 --steps 2 --corpus texts"
    assert run(f"train indexer adopted --sparse --out sparse {again}")[0] == 0
    assert run(f"adopt adopted --out twice {again}") == (
        1, "", "error: adopted has an indexer already: dsa train indexer goes on training it\n",
    )  # fmt: skip
    status, text, _ = run("eval sparse --length 32 --sequences 2 --corpus texts --out found.json")
    found = json.loads((home / "found.json").read_text())
    assert status == 0 and found["top_k"] == 4 and found["command"].startswith("dsa eval sparse --length 32")
    assert set(found["measures"]["loss"]) == {"dense", "sparse", "oracle", "window", "random"}
    assert f"{found['measures']['loss']['sparse']:.4f}" in text and "in layer 1, indexer" in text


def test_eval_of_a_dense_model_asks_no_indexer(run):
    status, text, _ = run("eval dense --length 32 --sequences 2 --top-k 4 --corpus texts")
    assert status == 0 and "loss, window" in text and "indexer" not in text


def test_train_pretrain(run, monkeypatch):
    from dsa.training import pretrain

    monkeypatch.setattr(pretrain, "phases", lambda corpus: [])  # whether it learns is seen in test_training
    monkeypatch.setattr(pretrain, "dense_config", lambda: small.config(**small.DENSE, vocab_size=305))
    monkeypatch.setattr(pretrain, "LENGTH", 64)
    status, text, _ = run("train pretrain --out base --corpus texts")
    assert status == 0 and text.endswith("made base\n")


@pytest.mark.parametrize(
    "line",
    [
        "cpu --shape s1 --longest 1024 --quick",
        "decode --lengths 32 64 --repeats 1",
        "indexer-loss --lengths 32 64 --repeats 1",
        "full-width --device cpu --layers 1 --lengths 16 --out width.json",
    ],
)
def test_bench(line, run, monkeypatch):
    monkeypatch.setattr(dsa.Config, "v32_exp", lambda: small.config())
    status, text, errors = run(f"bench {line}")
    assert status == 0 and text, errors


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        ("nonsense", 2, "dsa has no command 'nonsense': use one of inspect, generate, chat"),
        ("train sft", 2, "dsa train has no command 'sft': use one of pretrain, indexer"),
        ("inspect", 2, "the following arguments are required: FOLDER (dsa inspect --help explains)"),
        ("eval dense --length none", 2, "argument --length: 'none' must be a whole number of at least 1"),
        ("eval dense --lenght 3", 2, "unrecognized arguments: --lenght 3"),
        ("bench cpu --out texts", 2, "texts exists: choose another --out, or --replace it"),
        ("inspect absent", 1, "absent is not a folder"),
        ("generate absent --prompt a", 1, "absent is not a folder"),
        ("chat absent", 1, "absent is not a folder"),
        ("adopt absent --out new", 1, "absent is not a folder"),
        ("eval absent", 1, "absent is not a folder"),
        ("eval dense --length 500", 1, "--length 500 must lie in 2 to max_position_embeddings=128"),
        ("train pretrain --out dense", 1, "dense exists: choose another --out"),
        ("bench full-width --out texts --device cpu", 1, "texts exists: choose another --out"),
    ],
)
def test_errors_are_one_sentence_and_a_status(line, status, said, run):
    found, text, errors = run(line)
    assert (found, text) == (status, "")
    assert errors.startswith(f"error: {said}") and errors.count("\n") == 1


def test_ctrl_c_ends_with_the_status_that_shells_know(run, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("dsa.generation.cli.from_pretrained", stopped)
    assert run("generate dense --prompt a") == (130, "", "")


def test_what_asks_for_an_optional_package_names_the_extra(home, tmp_path, monkeypatch, run):
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # importing it raises ImportError
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"needs the tokenizers package: pip install 'dsa\[chat\]'"):
        token_ids.read_tokenizer_json(tmp_path / "tokenizer.json")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert {"chat", "gguf", "triton"} <= extras.keys() and extras["chat"] == ["tokenizers", "jinja2"]


def test_a_chat_template_without_jinja_names_the_extra(monkeypatch):
    from dsa.datasets.tokenizers import Tokenizer

    monkeypatch.setitem(sys.modules, "jinja2", None)
    told = Tokenizer(str.split, " ".join, {}, template="{{ messages }}")
    with pytest.raises(ValueError, match=r"needs the jinja2 package: pip install 'dsa\[chat\]'"):
        told.conversation([{"role": "user", "content": "hello"}])
