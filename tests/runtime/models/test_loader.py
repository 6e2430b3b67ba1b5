"""Checkpoints on disk: what loads, and what is said of those that do not."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file

from superinfer.errors import CheckpointNotFoundError, ModelLoadError, UnsupportedError
from superinfer.runtime.models.config import load_config
from superinfer.runtime.models.loader import HUB_COPIES, HUB_FILES, load_model, resolve_model


@pytest.fixture
def folder(tmp_path):
    make_checkpoint(tmp_path)
    return tmp_path


def edit_config(folder, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        config.pop(name, None)
        if value is not None:
            config[name] = value
    path.write_text(json.dumps(config))


def edit_weights(folder, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------------ loading


def test_fused_parameters_hold_their_parts_in_order(folder):
    tensors = load_file(folder / "model.safetensors")
    attention = load_model(folder).model.layers[1].self_attn
    parts = [tensors[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(attention.qkv_proj.weight, torch.cat(parts))


def test_a_sharded_checkpoint_loads_like_a_single_file(tmp_path):
    reference = make_checkpoint(tmp_path / "one")
    reference.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = load_model(tmp_path / "one").state_dict(), load_model(tmp_path / "many").state_dict()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_weights_are_converted_to_the_dtype_asked_for(folder):
    model = load_model(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.frequencies.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_tied_embeddings_are_one_tensor_whether_or_not_the_file_repeats_them(tmp_path):
    make_checkpoint(tmp_path, "llama-tied")
    model = load_model(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    edit_weights(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert torch.equal(load_model(tmp_path).lm_head.weight, model.lm_head.weight)


def test_a_shared_tensor_may_have_been_kept_under_the_name_of_the_head(tmp_path):
    """As `safetensors.torch.save_model` keeps it."""
    make_checkpoint(tmp_path, "llama-tied")
    whole = load_model(tmp_path)
    edit_weights(tmp_path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert torch.equal(load_model(tmp_path).model.embed_tokens.weight, whole.model.embed_tokens.weight)


@pytest.mark.parametrize("table", ["inv_freq", "cos_cached", "sin_cached"])
def test_tables_of_positions_that_old_checkpoints_carry_are_left_aside(folder, table):
    name = f"model.layers.0.self_attn.rotary_emb.{table}"
    edit_weights(folder, lambda t: t.update({name: torch.full((8,), float("nan"))}))
    load_model(folder)


def test_progress_ends_at_one_and_never_falls(folder):
    seen = []
    load_model(folder, on_progress=lambda label, fraction: seen.append(fraction))
    assert seen == sorted(seen) and seen[-1] == 1.0 and len(seen) > 10


@pytest.mark.parametrize("variant", ["llama", "llama-tied"])
def test_drawing_many_weights_shows_its_progress(tmp_path, variant, monkeypatch):
    make_checkpoint(tmp_path, variant)
    seen = []
    load_model(tmp_path, load_format="dummy", on_progress=lambda label, fraction: seen.append(fraction))
    assert not seen  # nobody waits for these few
    monkeypatch.setattr("superinfer.runtime.models.loader.DUMMY_PIECE", 1000)
    load_model(tmp_path, load_format="dummy", on_progress=lambda label, fraction: seen.append(fraction))
    assert seen == sorted(seen) and seen[-1] == 1.0 and len(seen) > 10


def test_dummy_weights_need_no_file_and_follow_the_seed(folder):
    (folder / "model.safetensors").unlink()
    one, same, other = (load_model(folder, load_format="dummy", seed=seed) for seed in (1, 1, 2))
    weight = one.model.layers[0].mlp.down_proj.weight
    assert torch.equal(weight, same.model.layers[0].mlp.down_proj.weight)
    assert not torch.equal(weight, other.model.layers[0].mlp.down_proj.weight)
    assert weight.std().item() == pytest.approx(0.2, rel=0.1)
    assert (one.model.norm.weight == 1).all()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory in use is read from /proc")
def test_loading_takes_the_memory_of_the_weights_and_no_second_copy(tmp_path):
    make_checkpoint(tmp_path, hidden_size=256, intermediate_size=4096, num_hidden_layers=6).save_pretrained(
        tmp_path, max_shard_size="30MB"
    )
    (tmp_path / "model.safetensors").unlink()  # of the first save, in one file

    def megabytes() -> float:  # that are the process's own: mapped files do not count
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) / 1024

    before, seen = megabytes(), []
    model = load_model(tmp_path, on_progress=lambda label, fraction: seen.append(megabytes()))
    weights = sum(p.nbytes for p in model.parameters()) / 2**20
    assert weights > 70 and max(seen) - before < weights + 16


# ------------------------------------------------------------------------------------------------ experts


@pytest.mark.parametrize(
    "variant,block,names",
    [("mixtral", "block_sparse_moe", "w1 w3 w2"), ("qwen3-moe", "mlp", "gate_proj up_proj down_proj")],
)
def test_experts_are_read_one_by_one_as_checkpoints_hold_them(tmp_path, variant, block, names):
    make_checkpoint(tmp_path, variant)
    tensors = load_file(tmp_path / "model.safetensors")
    at = f"model.layers.1.{block}.experts.3"
    gate, up, down = (tensors[f"{at}.{name}.weight"] for name in names.split())
    experts = load_model(tmp_path).model.layers[1].mlp.experts
    assert torch.equal(experts.gate_up_proj[3], torch.cat((gate, up)))
    assert torch.equal(experts.down_proj[3], down)


@pytest.mark.parametrize("variant", ["mixtral", "qwen3-moe-dense-first"])
def test_experts_may_be_stacked_on_disk_as_transformers_5_can_write_them(tmp_path, variant):
    make_checkpoint(tmp_path / "apart", variant).save_pretrained(tmp_path / "stacked", save_original_format=False)
    names = load_file(tmp_path / "stacked" / "model.safetensors")
    assert "model.layers.1.mlp.experts.gate_up_proj" in names
    apart, stacked = (load_model(tmp_path / kind).state_dict() for kind in ("apart", "stacked"))
    assert all(torch.equal(apart[name], stacked[name]) for name in apart)


def test_dummy_experts_are_drawn_in_pieces_of_bounded_size(tmp_path, monkeypatch):
    make_checkpoint(tmp_path, "mixtral")
    monkeypatch.setattr("superinfer.runtime.models.loader.DUMMY_PIECE", 1000)
    model = load_model(tmp_path, load_format="dummy", dtype=torch.bfloat16)
    experts = model.model.layers[2].mlp.experts
    assert experts.gate_up_proj.float().std().item() == pytest.approx(0.2, rel=0.05)
    assert len({expert.float().sum().item() for expert in experts.down_proj}) == 5


def test_a_missing_expert_is_named(tmp_path):
    make_checkpoint(tmp_path, "qwen3-moe")
    edit_weights(tmp_path, lambda t: t.pop("model.layers.2.mlp.experts.4.up_proj.weight"))
    with pytest.raises(ModelLoadError, match=r"lacks 1 of 84 tensors.*layers\.2\.mlp\.experts\.4\.up_proj"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "variant,changes,match",
    [
        ("mixtral", dict(num_experts_per_tok=6), "num_experts_per_tok=6 is not within 1..5 experts"),
        ("qwen3-moe", dict(decoder_sparse_step=0), "decoder_sparse_step=0 must be at least 1"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(tmp_path, variant, changes, match):
    make_checkpoint(tmp_path, variant)
    edit_config(tmp_path, **changes)
    with pytest.raises(ModelLoadError, match=match):
        load_config(tmp_path)


# ------------------------------------------------------------------------------------------------- config


def test_old_and_new_rope_forms_mean_the_same(folder):
    scaling = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    scaling["original_max_position_embeddings"] = 64
    edit_config(folder, rope_parameters={**scaling, "rope_theta": 5e5})
    new = load_config(folder).rope
    edit_config(folder, rope_parameters=None, rope_scaling=scaling, rope_theta=5e5)
    assert load_config(folder).rope == new
    edit_config(folder, rope_scaling=None)
    assert load_config(folder).rope.inv_freq[1] == pytest.approx(5e5 ** (-2 / 16))


@pytest.mark.parametrize(
    "config,generation,expected",
    [(7, None, (7,)), ([7, 8], None, (7, 8)), (7, [9, 10], (9, 10)), (7, 11, (11,))],
)
def test_eos_ids_come_from_the_generation_config_if_there_is_one(folder, config, generation, expected):
    edit_config(folder, eos_token_id=config)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert load_config(folder).eos_token_ids == expected


@pytest.mark.parametrize("eos", ["<|im_end|>", {"__type": "AddedToken", "content": "<|im_end|>", "lstrip": False}])
def test_the_tokenizers_eos_ends_an_answer_too(folder, eos):
    """Who teaches a model to chat often gives its tokenizer another end than its config."""
    edit_config(folder, eos_token_id=7)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokens = [{"id": 8, "content": "<s>", "special": True}, {"id": 9, "content": "<|im_end|>", "special": True}]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens, "model": {"vocab": {"a": 0}}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    assert load_config(folder).eos_token_ids == (7, 9)
    (folder / "tokenizer.json").write_text('{"added_tokens": ')
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json is not valid"):
        load_config(folder)


def test_an_eos_that_no_token_has_is_none(folder):
    """It would be looked for among the logits where a request has min_tokens."""
    edit_config(folder, eos_token_id=[-1, 7, 211])
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert load_config(folder).eos_token_ids == (7,)


@pytest.mark.parametrize(
    "variant,changes,expected",
    [
        ("mistral", dict(sliding_window=7), (7, 7, 7)),
        ("mistral", dict(sliding_window=256), (None, None, None)),  # max_position_embeddings: it never limits
        ("qwen2", dict(sliding_window=7, use_sliding_window=False), (None, None, None)),
        ("qwen2", dict(sliding_window=7, use_sliding_window=True, max_window_layers=2), (None, None, 7)),
        ("llama", dict(sliding_window=7), (None, None, None)),  # an unused leftover in some Llama configs
    ],
)
def test_windows_are_read_by_layer(tmp_path, variant, changes, expected):
    make_checkpoint(tmp_path, variant)
    edit_config(tmp_path, layer_types=None, **changes)
    assert load_config(tmp_path).windows == expected


def test_a_window_that_sees_nothing_is_refused(tmp_path):
    make_checkpoint(tmp_path, "mistral")
    edit_config(tmp_path, sliding_window=0)
    with pytest.raises(ModelLoadError, match="sliding_window=0 must be at least 1"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "changes,match",
    [
        (dict(hidden_act="gelu"), "hidden_act='gelu'"),
        (dict(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)), "rope_type='dynamic'.*llama3"),
        (
            dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
            "partial_rotary_factor=0.5",
        ),
    ],
)
def test_features_not_implemented_are_refused_by_name(folder, changes, match):
    edit_config(folder, **changes)
    with pytest.raises(UnsupportedError, match=match):
        load_config(folder)


# ------------------------------------------------------------------------------------------------- errors


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match=r"nowhere.*not an existing folder.*check the path"):
        resolve_model(str(tmp_path / "nowhere"))


def test_a_file_is_not_a_model(folder):
    with pytest.raises(ModelLoadError, match="is a file; give the folder"):
        resolve_model(str(folder / "model.safetensors"))


def test_a_hub_name_without_a_network_says_so(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match=r"'nobody/no-such-model'.*network") as failed:
        resolve_model("nobody/no-such-model")
    assert failed.type is ModelLoadError  # whether there is such a model is not known


@pytest.mark.parametrize(
    "status,code,error", [(404, "RepoNotFound", CheckpointNotFoundError), (403, "GatedRepo", ModelLoadError)]
)
def test_a_name_the_hub_does_not_know_is_told_apart_from_one_it_may_not_give(monkeypatch, status, code, error):
    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
        with pytest.raises(ModelLoadError, match="'nobody/no-such-model'") as failed:
            resolve_model("nobody/no-such-model")
        hub.shutdown()
    assert failed.type is error


def test_a_hub_name_already_downloaded_needs_no_network(folder, tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("hub")
    snapshot = cache / "models--someone--small-model" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (cache / "models--someone--small-model" / "refs").mkdir()
    (cache / "models--someone--small-model" / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    found = resolve_model("someone/small-model")
    assert found == snapshot and load_config(found).num_layers == 3


def test_of_a_repository_only_what_is_read_is_downloaded():
    from huggingface_hub.utils import filter_repo_objects

    read = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "chat_template.jinja"]
    other = ["consolidated.safetensors", "consolidated.00.pth", "original/params.json", "pytorch_model.bin", "a.gguf"]
    kept = filter_repo_objects(read + other, allow_patterns=HUB_FILES, ignore_patterns=HUB_COPIES)
    assert list(kept) == read


def test_an_unknown_architecture_is_named_with_those_supported(folder):
    edit_config(folder, architectures=["GPT2LMHeadModel"])
    with pytest.raises(
        ModelLoadError, match=r"'GPT2LMHeadModel' is not supported; supported: LlamaForCausalLM, Mis.*Mixtral"
    ):
        load_model(folder)


@pytest.mark.parametrize("text,match", [("{", "cannot be read as JSON"), ("[]", "list, not"), ("{}", "architectures")])
def test_a_damaged_config_is_named(folder, text, match):
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelLoadError, match=match):
        load_model(folder)


def test_a_config_of_nonsense_values_is_refused(folder):
    edit_config(folder, num_key_value_heads=3)
    with pytest.raises(ModelLoadError, match=r"config\.json|num_key_value_heads=3"):
        load_config(folder)
    edit_config(folder, num_key_value_heads=2, hidden_size="wide")
    with pytest.raises(ModelLoadError, match=r"config\.json is not a valid LlamaForCausalLM config"):
        load_config(folder)


def test_a_folder_without_config_is_no_checkpoint(tmp_path):
    with pytest.raises(ModelLoadError, match=r"config\.json does not exist"):
        load_model(tmp_path)


def test_a_truncated_file_is_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors is damaged or incomplete"):
        load_model(folder)


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", b"\x08" + bytes(100)]
)
def test_a_file_that_is_no_safetensors_is_named(folder, content):
    """Empty, the pointer that git leaves without git-lfs, and noise."""
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"model\.safetensors is damaged or incomplete"):
        load_model(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_are_refused_by_name(folder, dtype):
    edit_weights(folder, lambda t: t.update({"model.norm.weight": torch.ones(64).to(dtype)}))
    with pytest.raises(ModelLoadError, match=rf"'model\.norm\.weight' holds {dtype}.*quantized"):
        load_model(folder)


@pytest.mark.parametrize("name", ["down_proj.qweight", "down_proj.weight_scale", "down_proj.g_idx"])
def test_tensors_that_belong_to_quantized_weights_say_so(folder, name):
    edit_weights(folder, lambda t: t.update({f"model.layers.0.mlp.{name}": torch.ones(8)}))
    with pytest.raises(ModelLoadError, match=rf"mlp\.{name}'.*belongs to quantized weights; take the model's unquant"):
        load_model(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_number_that_is_no_weight_is_refused_where_it_is(folder, name, value):
    """A model with one answers nonsense, and says nothing of it."""
    edit_weights(folder, lambda t: t[name].view(-1)[5].fill_(value))
    with pytest.raises(ModelLoadError, match=rf"model\.safetensors: tensor '{name}' holds NaN or infinity.*again"):
        load_model(folder)


def test_a_weight_beyond_the_dtype_asked_for_is_named(folder):
    edit_weights(folder, lambda t: t["model.norm.weight"][5].fill_(70000.0))
    load_model(folder, dtype=torch.bfloat16)
    with pytest.raises(ModelLoadError, match=r"'model\.norm\.weight' holds numbers beyond float16; take dtype bf"):
        load_model(folder, dtype=torch.float16)


def test_tied_embeddings_that_differ_on_disk_are_not_guessed_at(tmp_path):
    make_checkpoint(tmp_path, "llama-tied")
    edit_weights(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ModelLoadError, match=r"tie_word_embeddings=true, but its 'lm_head.weight' is not"):
        load_model(tmp_path)


def test_a_model_larger_than_memory_is_told_its_size(folder):
    edit_config(folder, intermediate_size=1 << 36)
    with pytest.raises(ModelLoadError, match=r"weights take 147456\.0 GiB in float32, and cpu has .* free"):
        load_model(folder, load_format="dummy")


def test_a_missing_tensor_is_named(folder):
    edit_weights(folder, lambda t: t.pop("model.layers.2.self_attn.k_proj.weight"))
    with pytest.raises(ModelLoadError, match=r"lacks 1 of 30 tensors.*layers\.2\.self_attn\.k_proj\.weight"):
        load_model(folder)


@pytest.mark.parametrize("wrong", ["missing", "has no place"])
def test_names_are_checked_before_weights_are_read(tmp_path, wrong):
    make_checkpoint(tmp_path / "one").save_pretrained(tmp_path / "many", max_shard_size="60KB")
    shard = max((tmp_path / "many").glob("*.safetensors"))
    tensors = load_file(shard)
    name, tensor = tensors.popitem()
    if wrong != "missing":
        tensors |= {name: tensor, "model.extra.weight": tensor.clone()}
    save_file(tensors, shard, metadata={"format": "pt"})
    seen: list[float] = []
    with pytest.raises(ModelLoadError, match="lacks 1 of" if wrong == "missing" else "'model.extra.weight'.*no place"):
        load_model(tmp_path / "many", on_progress=lambda _, done: seen.append(done))
    assert not seen


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(folder):
    edit_weights(folder, lambda t: t.update({"model.norm.weight": torch.ones(63)}))
    with pytest.raises(ModelLoadError, match=r"'model\.norm\.weight' is \[63\].*asks for \[64\]"):
        load_model(folder)


def test_a_leftover_tensor_is_named(folder):
    edit_weights(folder, lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.ones(96, 64)}))
    with pytest.raises(ModelLoadError, match=r"'model\.layers\.3\.mlp\.up_proj\.weight'.*no place"):
        load_model(folder)


def test_a_folder_without_safetensors_is_told_what_is_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"neither model\.safetensors nor"):
        load_model(folder)


def test_parts_without_their_index_and_a_gguf_file_are_told_what_to_take(tmp_path):
    make_checkpoint(tmp_path).save_pretrained(tmp_path, max_shard_size="60KB")
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"parts of a model, but not model\.safetensors\.index\.json; download it"):
        load_model(tmp_path)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelLoadError, match=r"model\.gguf' is a GGUF file, which is not read; take the safetensors"):
        resolve_model(str(tmp_path / "model.gguf"))


def test_a_missing_shard_and_a_damaged_index_are_named(tmp_path):
    make_checkpoint(tmp_path / "one").save_pretrained(tmp_path / "many", max_shard_size="60KB")
    shard = sorted((tmp_path / "many").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelLoadError, match=f"{shard.name}.*does not exist"):
        load_model(tmp_path / "many")
    for text in ("{}", "[", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'):
        (tmp_path / "many" / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ModelLoadError, match=r"index.json is damaged"):
            load_model(tmp_path / "many")
