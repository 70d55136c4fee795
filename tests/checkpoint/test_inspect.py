"""A folder is known from its headers: what is in it, what it takes, whether it loads.

The published model itself is here, as 671 billion parameters of nothing: files of the right length and table of
contents, without a single stored number.
"""

import json
from collections import Counter
from math import ceil

import pytest
import torch

import dsa
import published_style
import small
from dsa.analysis import serving_fit
from dsa.analysis.memory import stored_parameters, weight_bytes_read
from dsa.checkpoint import inspect
from dsa.checkpoint.save import FP8_WEIGHTS
from dsa.model.config import Config
from dsa.model.transformer import Layer, Transformer

WIDTHS = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


def hollow_file(path, entries):
    """A safetensors file with a table of contents and a hole where the numbers would be."""
    table, end = {}, 0
    for name, (kind, shape) in entries.items():
        size = WIDTHS[kind] * torch.Size(shape).numel()
        table[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    words = json.dumps(table).encode()
    with path.open("wb") as file:
        file.write(len(words).to_bytes(8, "little") + words)
        file.truncate(8 + len(words) + end)


def published_entries(config):
    """Names, types and shapes as published, the layer beyond the last included."""
    first = config.first_k_dense_replace
    with torch.device("meta"):  # one layer of experts stands for all
        few = Transformer(config.replace(num_hidden_layers=first))
        extra = {name: tuple(t.shape) for name, t in Layer(config, first).state_dict().items()}
    shapes = {name: tuple(t.shape) for name, t in few.state_dict().items()}
    for layer in range(first, config.num_hidden_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in extra.items()}
    D, vocab = config.hidden_size, config.vocab_size
    extra |= {"enorm.weight": (D,), "hnorm.weight": (D,), "eh_proj.weight": (D, 2 * D), "shared_head.norm.weight": (D,)}
    extra |= {"embed_tokens.weight": (vocab, D), "shared_head.head.weight": (vocab, D)}
    shapes |= {f"model.layers.{config.num_hidden_layers}.{name}": shape for name, shape in extra.items()}
    entries = {}
    for name, shape in shapes.items():
        if FP8_WEIGHTS.search(name):
            entries[name] = ("F8_E4M3", shape)
            entries[name + "_scale_inv"] = ("F32", tuple(ceil(size / 128) for size in shape))
        else:
            entries[name] = ("F32" if "norm" in name or "bias" in name else "BF16", shape)
    return entries


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """DeepSeek-V3.2-Exp in 163 hollow files."""
    folder, config = tmp_path_factory.mktemp("v32"), Config.v32_exp()
    entries = published_entries(config)
    weight_map = {}
    for number in range(163):
        part = dict(list(entries.items())[number::163])
        hollow_file(folder / f"model-{number}.safetensors", part)
        weight_map |= dict.fromkeys(part, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(published_style.old_style(config)))
    return inspect.inspect_folder(folder)


@pytest.mark.slow
def test_the_published_model_adds_up(published):
    parameters, config = published.parameters(), Config.v32_exp()
    assert published.problem is None
    assert parameters["indexer"] == 61 * 13_959_424
    main = {part: count for part, count in parameters.items() if part != inspect.MTP_PART}
    few = main["norms"] + 58 * 256 + 61 * 2 * 128  # norms, router biases and the index keys' LayerNorm: no matrices
    assert sum(main.values()) == stored_parameters(config) + few
    assert round(sum(main.values()) / 1e9, 2) == round(671.03 + 0.85, 2)
    copies = 2 * config.vocab_size * config.hidden_size
    assert round((parameters[inspect.MTP_PART] - copies) / 1e9, 1) == 11.6
    assert round(sum(parameters.values()) / 1e9) == 685
    assert set(main) == {part for part, _ in inspect.PARTS}


@pytest.mark.slow
def test_the_published_model_in_memory(published):
    """One GPU holds it all; on eight, an eighth of what is split and all of the rest."""
    one, eight = (published.weight_bytes(n, keep_fp8=True) for n in (1, 8))
    everything = weight_bytes_read(Config.v32_exp(), "deployed", tokens=10**9)  # all experts; no embedding, no norms
    embedding = 2 * 129280 * 7168

    def in_fp32(gpus):
        """Two bytes more for what is computed in fp32 here and may be bf16 in a deployment: head and index weights."""
        return 2 * (129280 * 7168 / gpus + 61 * 64 * 7168)

    assert one == pytest.approx(everything + embedding + in_fp32(1), rel=1e-4)
    assert 640e9 < one < 690e9 and 0.125 * one < eight < 0.135 * one
    assert published.weight_bytes(1, keep_fp8=False) == pytest.approx(2 * 671.88e9 + in_fp32(1), rel=1e-3)
    for gpus in inspect.GPUS:  # the same from the sizes alone
        from_sizes = serving_fit.weight_bytes(Config.v32_exp(), "deployed", gpus) + in_fp32(gpus)
        assert published.weight_bytes(gpus, keep_fp8=True) == pytest.approx(from_sizes, rel=1e-3)
    text = "\n".join(inspect.report(published))
    assert "it will load" in text and "cache, deployed" in text and "multi-token prediction" in text


@pytest.mark.parametrize("keep", [True, False])
def test_the_memory_foretold_is_the_memory_taken(keep, tmp_path):
    published_style.write(tmp_path)
    model = dsa.from_pretrained(tmp_path, dtype=torch.bfloat16, keep_fp8=keep)
    taken = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert inspect.inspect_folder(tmp_path).weight_bytes(1, keep) == taken


def test_the_command_lists_what_is_there(tmp_path, capsys):
    config, twin = published_style.write(tmp_path)
    with pytest.raises(SystemExit) as ended:
        inspect.main([str(tmp_path)])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "3 layers, sparse, top-6, context 128" in text and "it will load" in text
    total = sum(t.numel() for name, t in twin.items() if "layers.3." not in name)
    assert f"{total:,}" in text and f"{sum(t.numel() for t in twin.values()) - total:,}" in text
    kinds = Counter(tensor.dtype for tensor in inspect.inspect_folder(tmp_path).stored.values())
    assert all(f"{count} tensors in {kind}" in text for kind, count in kinds.items()) and len(kinds) == 3
    assert config.index_topk == 6


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    dsa.save_pretrained(small.model(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 62}))
    with pytest.raises(SystemExit) as ended:
        inspect.main([str(tmp_path)])
    text = capsys.readouterr().out  # what is there is listed all the same
    assert ended.value.code == 1 and "it will NOT load" in text and "expected (62, 48)" in text and "experts" in text
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match=r"error: .* no safetensors at all"):
        inspect.main([str(tmp_path)])
