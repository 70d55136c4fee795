"""Folders in the published FP8 format: read, kept or expanded, written again, and refused when they are broken.

The folder is built by other code than the package's (`published_style`), with every trap of the real ones. Its
logits are those of its dequantised twin, bit for bit. Loading takes the model's memory and that of one file.
"""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dsa
import memory
import published_style
import small
from dsa.checkpoint import save
from dsa.checkpoint.index import INDEX, SINGLE, CheckpointError
from dsa.kernels import fp8
from dsa.model.config import Config
from dsa.model.fp8_linear import FP8Linear
from dsa.model.transformer import Transformer

WEIGHT = "model.layers.1.mlp.experts.2.down_proj.weight"  # (200, 129): four blocks, three of them partial
SCALE = WEIGHT + "_scale_inv"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A published-style folder, its config, and the plain numbers of its weights."""
    folder = tmp_path_factory.mktemp("published") / "folder"
    return folder, *published_style.write(folder)


@pytest.fixture
def folder(tmp_path):
    """One to be damaged."""
    published_style.write(tmp_path)
    return tmp_path


def main_part(twin, config):
    return {name: t for name, t in twin.items() if f"layers.{config.num_hidden_layers}." not in name}


@pytest.fixture(scope="module")
def twin(made):
    """The same model in plain fp32, put together by hand."""
    _, config, numbers = made
    model = Transformer(config)
    model.load_state_dict(main_part(numbers, config))
    return model.eval()


# ---- the same numbers


def test_the_folder_has_every_trap(made):
    folder, config, _ = made
    where = json.loads((folder / INDEX).read_text())["weight_map"]
    kinds = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            kinds |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    scales = [name for name in where if name.endswith("_scale_inv")]
    assert set(kinds.values()) == {"F8_E4M3", "BF16", "F32"} and len(scales) > 30
    assert all(where[name] != where[name.removesuffix("_scale_inv")] for name in scales)
    assert any(f"layers.{config.num_hidden_layers}.self_attn.indexer.wk" in name for name in scales)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("attention", ["sparse", "dense"])
@torch.no_grad()
def test_logits_are_those_of_the_dequantised_twin(keep, attention, made, twin):
    model, tokens = dsa.from_pretrained(made[0], keep_fp8=keep), small.tokens(2, 40)
    model.attention = twin.attention = attention
    assert model.config == made[1] and not model.training and model.dtype == torch.float32
    assert torch.equal(model(tokens), twin(tokens))
    assert torch.equal(dsa.generate(model, tokens[:, :9], 5), dsa.generate(twin, tokens[:, :9], 5))
    twin.attention = "sparse"


@torch.no_grad()
def test_kept_and_expanded_agree_in_half_precision(made):
    kept, wide = (dsa.from_pretrained(made[0], dtype=torch.bfloat16, keep_fp8=keep) for keep in (True, False))
    tokens = small.tokens(1, 30)
    assert kept.dtype == wide.dtype == torch.bfloat16
    assert torch.equal(kept(tokens), wide(tokens))


def test_what_is_kept_takes_one_byte_a_weight(made):
    model = dsa.from_pretrained(made[0], dtype=torch.bfloat16, keep_fp8=True)
    layers = [part for part in model.modules() if isinstance(part, FP8Linear)]
    assert len(layers) == 3 * 7 + 3 + 2 * (4 + 1) * 3  # attention and indexer, one dense layer, experts and shared
    assert all(layer.weight.dtype == fp8.E4M3 and layer.weight_scale_inv.dtype == torch.float32 for layer in layers)
    assert not any(isinstance(part, torch.nn.Linear) for name, part in model.named_modules() if "expert" in name)
    expert = model.get_submodule(WEIGHT.removesuffix(".weight"))
    assert expert.weight.nbytes == 200 * 129 and expert.weight_scale_inv.shape == (2, 2)


def test_gradients_pass_through_what_is_kept(made):
    layer = dsa.from_pretrained(made[0], keep_fp8=True).get_submodule(WEIGHT.removesuffix(".weight"))
    x = torch.randn(3, 129, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.dequantized(torch.float32).sum(0).expand(3, -1))
    assert not list(layer.parameters())


# ---- writing


def kinds_and_bytes(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


def test_the_writer_stores_what_was_published(made, tmp_path):
    """From the same unrounded weights: equal codes and scales, and every tensor of the published type."""
    folder, config, _ = made
    dsa.save_pretrained(small.model(0, config), tmp_path, dtype=torch.bfloat16, fp8=True)
    ours = load_file(tmp_path / SINGLE)
    theirs = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    theirs = main_part(theirs, config)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor.float(), theirs[name].float()), name
    stated = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stated == json.loads((folder / "config.json").read_text())["quantization_config"]


def test_rounding_again_changes_nothing(twin, tmp_path):
    """Codes may differ where a block's largest number was rounded down to 448 * 2^n; what they stand for does not."""
    dsa.save_pretrained(twin, tmp_path, fp8=True)
    a, b = dsa.from_pretrained(tmp_path).state_dict(), twin.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_what_is_kept_is_written_as_it_is(made, tmp_path, monkeypatch):
    model = dsa.from_pretrained(made[0], keep_fp8=True)
    monkeypatch.setattr(save, "SHARD_BYTES", 300_000)
    dsa.save_pretrained(model, tmp_path)
    sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < 320_000
    back = dsa.from_pretrained(tmp_path, keep_fp8=True)
    a, b = model.state_dict(), back.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[n].float(), b[n].float()) for n in a)
    plain = dsa.from_pretrained(tmp_path)
    assert torch.equal(plain(small.tokens(1, 9)), model(small.tokens(1, 9)))


def test_weights_that_cannot_be_rounded_are_refused(tmp_path):
    model = small.model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="1 of 3072 numbers are infinite or NaN"):
        dsa.save_pretrained(model, tmp_path, fp8=True)


# ---- memory

LARGE = {"hidden_size": 640, "vocab_size": 64, "moe_intermediate_size": 640, "n_routed_experts": 16}
WARM_UP = "import sys, dsa; dsa.from_pretrained(sys.argv[3], keep_fp8=sys.argv[2] == 'keep')"  # what the library takes
LOAD = "model = dsa.from_pretrained(sys.argv[1], keep_fp8=sys.argv[2] == 'keep')"


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["keep", "expand"])
def test_loading_takes_the_model_and_one_file(keep, made, tmp_path, monkeypatch):
    """Measured by the operating system, in a process of its own; a second file in memory would be seen."""
    config = small.config(**LARGE)
    model = Transformer(config)
    model.reset_parameters()
    monkeypatch.setattr(save, "SHARD_BYTES", 8 * 2**20)
    dsa.save_pretrained(model, tmp_path, dtype=torch.bfloat16, fp8=True)
    files = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert len(files) >= 6
    size = sum(files) if keep == "keep" else sum(t.nbytes for t in model.state_dict().values())
    limit = size + 1.5 * max(files)
    peaks = []  # the system may map more of a file than is asked for, now and then: it may look again
    while not peaks or (peaks[-1] > limit and len(peaks) < 3):
        peaks.append(memory.peak_of_script(WARM_UP, LOAD, tmp_path, keep, made[0]))
    assert 0.9 * size < peaks[-1] < limit, f"{[round(p / 2**20, 1) for p in peaks]} MiB for {size / 2**20:.1f}"


# ---- damage


def file_of(folder, name):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def change(name, by):
    """Damage one tensor: `by(tensor)` replaces it, None removes it from the file."""

    def harm(folder):
        path = file_of(folder, name)
        tensors = load_file(path)
        tensors[name] = by(tensors[name])
        save_file({n: t for n, t in tensors.items() if t is not None}, path)

    return harm


def edit(file, by):
    def harm(folder):
        content = json.loads((folder / file).read_text())
        by(content)
        (folder / file).write_text(json.dumps(content))

    return harm


def with_scale(value):
    def by(scale):
        scale[1, 0] = value
        return scale

    return change(SCALE, by)


def quantization(**changes):
    return edit("config.json", lambda c: c["quantization_config"].update(changes))


DAMAGE = {
    "scales gone from file": (change(SCALE, lambda t: None), [f"lacks {SCALE}, which the index puts there"]),
    "scales gone from index": (
        edit(INDEX, lambda c: c["weight_map"].pop(SCALE)), [f"{WEIGHT} is FP8", "scales .* were found nowhere"],
    ),
    "scales in another file": (
        edit(INDEX, lambda c: c["weight_map"].update({SCALE: c["weight_map"][WEIGHT]})), [f"lacks {SCALE}"],
    ),
    "partial blocks forgotten": (
        change(SCALE, lambda t: t[:1, :1].clone()),
        [rf"{SCALE} has shape \(1, 1\), expected \(2, 2\)", r"of \(200, 129\), partial"],
    ),
    "a scale for each number": (change(SCALE, lambda t: torch.ones(200, 129)), [SCALE, r"expected \(2, 2\)"]),
    "scales of one dimension": (change(SCALE, lambda t: t.flatten()), [SCALE, r"shape \(4,\), expected \(2, 2\)"]),
    "scales in BF16": (change(SCALE, lambda t: t.bfloat16()), [f"{SCALE} is stored as BF16, expected F32"]),
    "scales as whole numbers": (change(SCALE, lambda t: t.int()), [f"{SCALE} is stored as I32, expected F32"]),
    "weights gone": (change(WEIGHT, lambda t: None), [f"lacks {WEIGHT}"]),
    "weights gone from index": (
        edit(INDEX, lambda c: c["weight_map"].pop(WEIGHT)),
        [f"{SCALE} scales {WEIGHT}, which was found nowhere"],
    ),
    "weights in BF16": (change(WEIGHT, lambda t: t.bfloat16()), ["which is BF16 in .* needs none: expected F8_E4M3"]),
    "weights transposed": (
        change(WEIGHT, lambda t: t.T.contiguous()), [WEIGHT, r"\(129, 200\), expected \(200, 129\)"],
    ),
    "weights in e5m2": (
        change(WEIGHT, lambda t: t.to(torch.float8_e5m2)), [f"{WEIGHT} is stored as F8_E5M2, expected one of"],
    ),
    "weights as whole numbers": (change(WEIGHT, lambda t: t.view(torch.uint8)), [WEIGHT, "stored as U8"]),
    "a norm in FP8": (change(NORM, lambda t: t.to(fp8.E4M3)), [f"{NORM} is FP8", "only matrices .* store it as F32"]),
    "a norm of another size": (change(NORM, lambda t: t[:-1].clone()), [NORM, r"\(199,\), expected \(200,\)"]),
    "a file gone": (lambda f: file_of(f, SCALE).unlink(), ["is missing: the index puts", "fetch it again"]),
    "a file cut off": (
        lambda f: file_of(f, SCALE).write_bytes(file_of(f, SCALE).read_bytes()[:-1]), ["is not a whole safetensors"],
    ),
    "a file that is a web page": (
        lambda f: file_of(f, SCALE).write_text("<html>not found</html>"), ["is not a whole safetensors"],
    ),
    "a layer too few": (
        edit("config.json", lambda c: c.update(num_hidden_layers=2)), [r"layers\.3\.", "unknown tensor"],
    ),
    "another method": (quantization(quant_method="awq"), [r"config\.json", "quant_method='awq', only 'fp8'"]),
    "other blocks": (quantization(weight_block_size=[64, 64]), [r"weight_block_size=\[64, 64\], only \[128, 128\]"]),
    "another eight bits": (quantization(fmt="e5m2"), ["fmt='e5m2', only 'e4m3'"]),
    "method no object": (
        edit("config.json", lambda c: c.update(quantization_config="fp8")), ["'fp8' is no JSON object"],
    ),
}  # fmt: skip
DAMAGED_SCALES = {"zero": 0.0, "negative": -0.5, "NaN": float("nan"), "infinite": float("inf")}


def refused(folder, words):
    with pytest.raises(CheckpointError) as error:
        dsa.from_pretrained(folder)
    for word in words:
        assert re.search(word, str(error.value)), f"{word!r} is not said by: {error.value}"
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_before_anything_is_allocated(damage, folder, monkeypatch):
    harm, words = DAMAGE[damage]
    harm(folder)
    monkeypatch.setattr(Transformer, "to_empty", lambda *_, **__: pytest.fail("weights were allocated"))
    refused(folder, words)


@pytest.mark.parametrize("value", DAMAGED_SCALES)
@pytest.mark.parametrize("keep", [False, True])
def test_a_scale_that_is_no_positive_number_is_refused(value, keep, folder):
    with_scale(DAMAGED_SCALES[value])(folder)
    with pytest.raises(CheckpointError, match=rf"1 of 4 scales in {SCALE} are zero, negative, infinite or NaN"):
        dsa.from_pretrained(folder, keep_fp8=keep)
    assert Config.from_dict(json.loads((folder / "config.json").read_text()))
