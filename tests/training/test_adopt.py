"""A dense model made by `transformers` gets an indexer here, and `transformers` loads the result and computes the same.

The models are random and tiny: shown are the way there and back, what stays as it was, what is refused and what the
table says; that a trained model keeps its recall is shown on data/ by test_data.
"""

import csv
import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DeepseekV32ForCausalLM

import dsa
import oracle
import small
from dsa.analysis import flops
from dsa.datasets import corpus, token_ids
from dsa.datasets.byte_tokenizer import VOCAB
from dsa.training import adopt, indexer, indexer_data

SIZES = {
    **{name: size for name, size in small.SIZES.items() if name not in ("yarn", *small.DENSE)},
    "num_hidden_layers": 2, "num_key_value_heads": small.SIZES["num_attention_heads"], "initializer_range": 0.2,
    "bos_token_id": 3, "eos_token_id": 4, "vocab_size": VOCAB,
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                        "original_max_position_embeddings": 32, "beta_fast": 32.0, "beta_slow": 1.0},
}  # fmt: skip
QUICK = ["--length", "64", "--steps", "8", "--batch", "2", "--index-heads", "16", "--top-k", "8"]


def dense(folder, dtype=torch.float32, shard="1GB", **changes):
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**(SIZES | changes))).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def command(*words):
    indexer.main([str(word) for word in words])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Dense folders by vocabulary, a text, and what a warm-up made of one of them."""
    root = tmp_path_factory.mktemp("adopt")
    (root / "text").mkdir()
    (root / "text" / "a.txt").write_text(small.LINES)
    ids = np.random.default_rng(0).integers(0, 61, 3000)
    np.save(root / "ids.npy", ids)
    dense(root / "ours")
    dense(root / "foreign", vocab_size=61)
    dense(root / "no_latent", q_lora_rank=None)
    command(root / "ours", "--corpus", root / "text", "--out", root / "warmed", *QUICK, "--steps", 40)
    return root


def comparison(folder):
    found = json.loads((folder / "provenance.json").read_text())["comparison"]
    return found, {row["measure"]: row for row in found["table"]}


def agree(folder, length=60):
    """`transformers` loads the whole folder and nothing else, and computes what we do."""
    other, info = DeepseekV32ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values())
    model = dsa.from_pretrained(folder)
    tokens = small.tokens(2, length, vocab=model.config.vocab_size)
    expected = oracle.theirs(other.eval(), tokens)
    tolerance = 2.5e-5 * max(1.0, expected.logits.std().item())
    return not oracle.differences(oracle.ours(model, tokens), expected, tolerance=tolerance)


def test_transformers_loads_the_warmed_model_and_computes_the_same(home):
    assert agree(home / "warmed")


def test_what_was_not_trained_is_the_same_bit_for_bit(home):
    before, after = (load_file(home / name / "model.safetensors") for name in ("ours", "warmed"))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(tensor.dtype == torch.float32 for tensor in after.values())
    added = after.keys() - before.keys()
    assert len(added) == 2 * 5 and all(".indexer." in name for name in added)
    model = dsa.from_pretrained(home / "warmed")
    model.attention = "dense"
    tokens = small.tokens(2, 60, vocab=VOCAB)
    assert torch.equal(model(tokens), dsa.from_pretrained(home / "ours")(tokens))


def test_the_type_of_the_stored_weights_stays(home, tmp_path):
    shards = sorted(dense(tmp_path / "half", torch.bfloat16, shard="60KB").glob("*.safetensors"))
    assert len(shards) > 1
    command(tmp_path / "half", "--corpus", home / "text", "--out", tmp_path / "out", *QUICK)
    before = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after["lm_head.weight"].dtype == torch.bfloat16
    assert all(torch.equal(tensor.float(), after[name].float()) for name, tensor in before.items())


def test_the_indexers_have_learned_and_their_sizes_are_those_asked_for(home):
    config = json.loads((home / "warmed" / "config.json").read_text())
    assert (config["index_n_heads"], config["index_head_dim"], config["index_topk"]) == (16, 16, 8)
    assert config["model_type"] == "deepseek_v32" and (config["bos_token_id"], config["eos_token_id"]) == (3, 4)
    assert (home / "warmed" / "generation_config.json").exists()
    with (home / "warmed" / "training.csv").open() as file:
        kl = [float(row["kl"]) for row in csv.DictReader(file)]
    assert len(kl) == 40 and sum(kl[-5:]) < 0.95 * sum(kl[:5])


def test_the_table_says_what_was_measured_and_what_was_counted(home):
    found, rows = comparison(home / "warmed")
    assert {row["kind"] for row in rows.values()} == {"measured", "counted"}
    loss = rows["loss, dense attention (bits per byte)"]
    assert loss["before"] == loss["after"] > 1  # frozen
    assert {"recall, dense attention", "recall, window"} <= rows.keys()
    kept = {who: rows[f"attention mass kept, {who}"]["after"] for who in ("indexer", "oracle", "window", "random")}
    assert max(kept.values()) == kept["oracle"] <= 1 and len(found["after"]["kept"]["indexer"]) == 2
    assert kept["indexer"] > rows["attention mass kept, indexer"]["before"]
    config = dsa.from_pretrained(home / "warmed").config
    for length in (64, 128, 2**17):
        row = rows[f"FLOP per token, reading {length:,} tokens"]
        work = [flops.prompt_flops(config, length, kind).total / length for kind in ("dense", "sparse")]
        assert [row["before"], row["after"]] == work and row["kind"] == "counted"


def test_sparse_training_afterwards_and_in_one_go(home, tmp_path):
    common = ["--corpus", home / "text", "--length", "64", "--batch", "2"]
    command(home / "warmed", "--sparse", "--steps", "3", "--out", tmp_path / "sparse", *common)
    assert agree(tmp_path / "sparse")
    both = ["--steps", "40", "--then-sparse", "3", "--cost-at", "4096"]
    command(home / "ours", "--out", tmp_path / "both", *QUICK, *common, *both)
    assert agree(tmp_path / "both")
    assert "FLOP per token, reading 4,096 tokens" in comparison(tmp_path / "both")[1]
    with (tmp_path / "both" / "training.csv").open() as file:
        assert [row["phase"] for row in csv.DictReader(file)] == ["warm-up"] * 40 + ["sparse"] * 3
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("sparse", "both"))
    assert all(torch.equal(one[name], two[name]) for name in one)  # the two ways are one


def test_stopped_between_the_stages_it_goes_on_from_there(home, tmp_path, monkeypatch):
    words = [home / "ours", "--corpus", home / "text", *QUICK, "--then-sparse", "2", "--out"]
    command(*words, tmp_path / "unbroken")
    with monkeypatch.context() as patch:
        patch.setattr(indexer, "joint_objective", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit, match="add --resume"):
            command(*words, tmp_path / "resumed")
    with monkeypatch.context() as patch:  # the warm-up is not done again
        patch.setattr(indexer, "indexer_kl_objective", lambda *_: None)
        command(*words, tmp_path / "resumed", "--resume")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("unbroken", "resumed"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("kind", ["npy", "safetensors", "folder"])
def test_a_model_with_its_own_vocabulary_is_taught_on_token_ids(kind, home, tmp_path):
    ids = torch.from_numpy(np.load(home / "ids.npy"))
    path = {"npy": home / "ids.npy", "safetensors": tmp_path / "ids.safetensors", "folder": tmp_path / "ids"}[kind]
    if kind == "safetensors":
        save_file({"b": ids[2000:], "a": ids[:2000]}, path)
    if kind == "folder":
        path.mkdir()
        np.save(path / "0.npy", ids[:1000].numpy().astype(np.uint16))
        np.save(path / "1.npy", ids[1000:].reshape(40, 50).numpy())
    corpus = token_ids.load_token_ids(path)
    assert torch.equal(torch.cat([corpus.train, corpus.held_out]), ids.int())
    if kind != "folder":
        return
    command(home / "foreign", "--corpus", path, "--out", tmp_path / "out", *QUICK)
    assert agree(tmp_path / "out")
    _, rows = comparison(tmp_path / "out")
    assert "loss, dense attention (nats per token)" in rows and not any(name.startswith("recall") for name in rows)


def test_a_tokenizer_beside_the_weights_reads_text(home, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"?": 0, **{chr(c): 1 + i for i, c in enumerate(b"\n 0123456789aefilnotx")}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    folder = dense(tmp_path / "foreign", vocab_size=61)
    made.save(str(folder / "tokenizer.json"))
    data = indexer_data.load(folder, 61, home / "text", 64)
    text = "".join(sorted(vocabulary, key=vocabulary.get)[i] for i in data.corpus.train.tolist())
    assert text == (home / "text" / "a.txt").read_text()[: len(text)] and len(text) > 10_000
    assert not data.in_bytes and not data.needles
    command(folder, "--corpus", home / "text", "--out", tmp_path / "out", *QUICK)
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_arrays_among_texts_are_not_taken_for_the_corpus(home, tmp_path):
    np.save(tmp_path / "a.npy", np.arange(5))
    assert token_ids.token_files(tmp_path) == [tmp_path / "a.npy"]
    (tmp_path / "a.txt").write_text("text")
    assert token_ids.token_files(tmp_path) == [] == token_ids.token_files(home / "text")


def test_raw_bytes_undo_the_folding():
    data = "a    b        ü\n     ".encode()
    assert token_ids.raw_bytes(corpus._ids(data)) == data


def no_latent(home):
    base = dsa.from_pretrained(home / "no_latent")
    return base, indexer.with_indexer(base, heads=16, width=16, top_k=8)


def test_without_a_query_latent_a_model_trains_and_runs_but_is_not_exported(home, tmp_path):
    base, model = no_latent(home)
    tokens = small.tokens(1, 40, vocab=VOCAB)
    assert torch.equal(model(tokens), base(tokens))
    task = indexer_data.load(home / "no_latent", VOCAB, home / "text", 64).task
    kl = [row["kl"] for row in indexer.warm_up(model, task, steps=40, size=2, show=False).rows]
    assert sum(kl[-5:]) < 0.95 * sum(kl[:5])
    indexer.train_sparse(model, task, steps=1, size=2, show=False)
    assert dsa.generate(model, tokens, max_new_tokens=4).shape == (1, 44)
    with pytest.raises(ValueError, match="deepseek_v32 requires this latent"):
        dsa.save_pretrained(model, tmp_path / "out")
    with pytest.raises(SystemExit, match=r"q_lora_rank is null.*no folder could hold the result"):
        command(home / "no_latent", "--corpus", home / "text", "--out", tmp_path / "out", *QUICK)
    assert not list(tmp_path.iterdir())  # refused before anything was done


def test_an_index_query_without_a_latent_is_formed_from_the_normed_hidden_state(home):
    _, model = no_latent(home)
    seen = []
    layer = model.model.layers[0].self_attn
    layer.indexer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    model.attention = "sparse"
    model(small.tokens(1, 20, vocab=VOCAB))
    assert torch.equal(seen[0][0], seen[0][1]) and layer.indexer.wq_b.weight.shape[1] == SIZES["hidden_size"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{v2}"], r"model_type='deepseek_v2', which cannot be given an indexer here: it routes"),
        (["{llama}"], r"model_type='llama', which cannot.*multi-head latent attention"),
        (["{ours}", "--index-head-dim", "4"], r"index_head_dim=4 must be at least qk_rope_head_dim=8"),
        (["{ours}", "--top-k", "64"], r"top-k 64 keeps every key of a sequence of 64"),
        (["{ours}", "--length", "500"], r"--length 500 must lie in 2 to max_position_embeddings=128"),
        (["{ours}", "--sparse"], r"is dense, so --sparse has no indexer"),
        (["{ours}", "--rate", "0"], r"--rate=0.0 must be a number above 0"),
        (["{warmed}", "--index-heads", "4"], r"has an indexer already"),
        (["{warmed}", "--sparse", "--then-sparse", "3"], r"give one of them"),
        (["{foreign}"], r"vocab_size=61.*305 ids: they do not fit.*--corpus token ids"),
        (["{larger}"], r"vocab_size=400.*would be noise to this model"),
        (["{foreign}", "--corpus", "{beyond}"], r"holds token id 61, but the model's vocab_size=61"),
        (["{foreign}", "--corpus", "{floats}"], r"holds float64, token ids are whole numbers"),
        (["{foreign}", "--corpus", "{negative}"], r"runs from -1 to"),
        (["{foreign}", "--corpus", "{broken}"], r"is not an array of token ids"),
        (["{foreign}", "--corpus", "{short}"], r"one sequence needs 64"),
    ],
)
def test_refusals_name_value_limit_and_remedy(words, said, home, tmp_path):
    folders = {"v2": "deepseek_v2", "llama": "llama"}
    for name, kind in folders.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": kind}))
    arrays = {"beyond": np.arange(62), "floats": np.ones(90), "negative": np.arange(-1, 60), "short": np.arange(60)}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "broken.npy").write_bytes(b"no array")
    if "{larger}" in words:
        dense(tmp_path / "larger", vocab_size=400)
    places = {name: home / name for name in ("ours", "foreign", "warmed")}
    places |= {name: tmp_path / name for name in (*folders, "larger")}
    places |= {name: tmp_path / f"{name}.npy" for name in (*arrays, "broken")}
    given = ["--corpus", home / "text", "--length", "64", *[word.format(**places) for word in words]]
    with pytest.raises(SystemExit, match=said):
        command(*given[4:5], *given[:4], *given[5:], "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_sizes_follow_the_published_ones():
    nothing = Namespace(index_heads=None, index_head_dim=None, top_k=None)
    real = adopt.index_sizes(dsa.Config.v32_exp().replace(**small.DENSE), nothing, 2**17)
    assert real == {"heads": 64, "width": 128, "top_k": 2048}
    ours = adopt.index_sizes(dsa.Config.mini().replace(**small.DENSE), nothing, 512)
    assert ours == {"heads": indexer.HEADS, "width": indexer.WIDTH, "top_k": indexer.TOP_K}


def test_only_the_course_model_is_held_against_the_course_claims(home):
    config = dsa.Config.mini()
    assert adopt.is_course_model(config, 512) and not adopt.is_course_model(config.replace(hidden_size=48), 512)
    found = json.loads((home / "warmed" / "provenance.json").read_text())
    assert found["claims"] == [] and found["measures"] == {}
