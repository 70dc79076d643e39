"""A model whose linear layers are a class of its own: quantised and adapted like any other, and never as bitsandbytes'
layers, which transformers would not make of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM

from qdora.errors import UserError
from qdora.export.merged import StreamedMerge, open_merge
from qdora.export.nf4_lora import check_foldable
from qdora.model.inject import adapted_layers, frozen_layers, inject
from qdora.model.load import Quantization, load_model
from qdora.model.source import resolve

LAYERS = ("dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value")


@pytest.fixture(scope="module")
def falcon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("falcon")
    torch.manual_seed(0)
    config = FalconConfig(vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=False)
    FalconForCausalLM(config).save_pretrained(directory)
    return directory


def test_its_layers_are_quantised_and_adapted(falcon: Path) -> None:
    model = load_model(resolve(str(falcon)), quant="nf4", compute_dtype=torch.float32)
    packed = [path for path, layer in frozen_layers(model).items() if layer.packed_weight is not None]
    assert sorted({path.rpartition(".")[2] for path in packed}) == sorted(LAYERS)
    assert len(packed) == 8
    assert list(inject(model, rank=2)) == packed


def test_an_unquantised_one_is_adapted(falcon: Path) -> None:
    model = FalconForCausalLM.from_pretrained(falcon)
    ids = torch.tensor([[3, 8, 1]])
    before = model(ids).logits
    inject(model, rank=2)
    assert len(adapted_layers(model)) == 8
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)


def test_its_4_bit_forms_are_refused(falcon: Path) -> None:
    model = load_model(resolve(str(falcon)), quant="nf4", compute_dtype=torch.float32)
    inject(model, rank=2)
    said = "transformers does not load 8 layers of this model in 4 bits .*a FalconLinear.*--format merged"
    with pytest.raises(UserError, match=f"--format nf4-lora: {said}"):
        check_foldable(model, torch.float32)
    wanted = Quantization("nf4", 64, True, ("lm_head",))
    merge = StreamedMerge(resolve(str(falcon)), None, wanted, torch.float32, requantize=True)
    with pytest.raises(UserError, match=f"--requantize: {said}"):
        open_merge(merge)
