"""Exchange weights on disk: what is saved comes back, and what does not fit changes nothing."""

import json
from dataclasses import replace

import pytest
import torch

from lace_lightning.adapter import read_exchange_config
from lace_lightning.exchange import Isolated, LatticeAttentionConfig
from lace_lightning.threaded_lm import ThreadedLM
from tests.helpers import EXCHANGES, ragged_groups, tiny_backbone, tiny_lm


def fresh(exchange=EXCHANGES["causal"], layers=(1, 2)) -> ThreadedLM:
    return ThreadedLM(tiny_backbone(), exchange, layers=layers).eval()


@pytest.mark.parametrize(
    "exchange", ["causal", "window-others", "same-step", "ungated", "top-k", "shared", "shared-gated"]
)
def test_a_saved_exchange_comes_back_bitwise(exchange, tmp_path):
    model, tokens = tiny_lm(EXCHANGES[exchange]), ragged_groups()
    model.save_exchange(tmp_path / "deep" / "adapter")
    other = fresh(EXCHANGES[exchange])
    other.load_exchange(str(tmp_path / "deep" / "adapter"))
    assert torch.equal(tokens.logits(other), tokens.logits(model))


def test_the_folder_holds_the_exchange_and_nothing_else(tmp_path):
    model = tiny_lm(EXCHANGES["causal"])
    model.save_exchange(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exchange.json", "exchange.safetensors"]
    size = (tmp_path / "exchange.safetensors").stat().st_size
    assert size < 4 * model.parameter_counts()["exchange"] + 4096
    assert json.loads((tmp_path / "exchange.json").read_text())["layers"] == [1, 2]


def test_saving_again_replaces_the_old_weights(tmp_path):
    model = tiny_lm(EXCHANGES["causal"])
    model.save_exchange(tmp_path)
    with torch.no_grad():
        model.exchanges["1"].up.weight.mul_(2)
    model.save_exchange(tmp_path)
    other = fresh()
    other.load_exchange(tmp_path)
    assert torch.equal(other.exchanges["1"].up.weight, model.exchanges["1"].up.weight)


def test_the_backend_is_no_property_of_the_weights(tmp_path):
    tiny_lm(EXCHANGES["causal"]).save_exchange(tmp_path)
    fresh(replace(EXCHANGES["causal"], backend="eager")).load_exchange(tmp_path)


def test_an_exchange_without_weights_saves_and_loads_too(tmp_path):
    fresh(Isolated()).save_exchange(tmp_path)
    fresh(Isolated()).load_exchange(tmp_path)


def test_settings_that_did_not_exist_when_the_file_was_written_were_at_their_defaults(tmp_path):
    tiny_lm(EXCHANGES["causal"]).save_exchange(tmp_path)
    settings = json.loads((tmp_path / "exchange.json").read_text())
    del settings["config"]["gate"]
    (tmp_path / "exchange.json").write_text(json.dumps(settings))
    fresh().load_exchange(tmp_path)
    assert read_exchange_config(tmp_path) == (EXCHANGES["causal"], [1, 2])
    refused(fresh(EXCHANGES["ungated"]), tmp_path, "config is .*'sigmoid'.* there and .*'none'.* here")


def refused(model: ThreadedLM, folder, message: str) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.load_exchange(folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "other, message",
    [
        (lambda: fresh(replace(EXCHANGES["causal"], scope="aligned")), "config is .*causal.* there and .*aligned"),
        (lambda: fresh(replace(EXCHANGES["causal"], width=8)), "config is"),
        (lambda: fresh(EXCHANGES["same-step"]), "exchange is 'LatticeAttentionConfig' there and 'SameStepConfig' here"),
        (lambda: fresh(Isolated()), "exchange is"),
        (lambda: fresh(layers=[1, 3]), r"layers is \[1, 2\] there and \[1, 3\] here"),
        (
            lambda: ThreadedLM(tiny_backbone("llama"), EXCHANGES["causal"], layers=[1, 2]),
            r"exchange\.safetensors does not fit.*down\.weight",
        ),
    ],
    ids=["scope", "width", "class", "isolated", "layers", "backbone-width"],
)
def test_an_exchange_of_another_model_is_refused_with_the_difference(other, message, tmp_path):
    tiny_lm(EXCHANGES["causal"]).save_exchange(tmp_path)
    refused(other(), tmp_path, message)


@pytest.mark.parametrize("name", ["exchange.safetensors", "exchange.json"])
def test_a_missing_file_is_named(name, tmp_path):
    tiny_lm(EXCHANGES["causal"]).save_exchange(tmp_path)
    (tmp_path / name).unlink()
    refused(fresh(), tmp_path, f"{name} is missing")


@pytest.mark.parametrize("name", ["exchange.safetensors", "exchange.json"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.95], ids=lambda share: f"{share:.0%}")
def test_a_truncated_file_is_called_damaged(name, share, tmp_path):
    tiny_lm(EXCHANGES["causal"]).save_exchange(tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    refused(fresh(), tmp_path, "damaged")


@pytest.mark.parametrize("content", [b"[]", b"\xff\xfe\x00", b"3", b"null"])
def test_settings_that_are_no_object_are_called_damaged(content, tmp_path):
    tiny_lm(EXCHANGES["causal"]).save_exchange(tmp_path)
    (tmp_path / "exchange.json").write_bytes(content)
    refused(fresh(), tmp_path, "damaged")


def test_missing_and_foreign_tensors_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_lm(EXCHANGES["causal"]).save_exchange(tmp_path)
    tensors = load_file(tmp_path / "exchange.safetensors")
    tensors["1.sideways.weight"] = tensors.pop("1.up.weight")
    save_file(tensors, tmp_path / "exchange.safetensors")
    refused(fresh(), tmp_path, r"1\.sideways\.weight.*1\.up\.weight")


def test_weights_keep_the_dtype_of_the_model_that_loads_them(tmp_path):
    tiny_lm(EXCHANGES["causal"]).save_exchange(tmp_path)
    rounded = ThreadedLM(
        tiny_backbone(dtype="bfloat16"), LatticeAttentionConfig(scope="causal", width=16, heads=2), layers=[1, 2]
    )
    rounded.load_exchange(tmp_path)
    assert {p.dtype for p in rounded.exchange_parameters()} == {torch.bfloat16}
