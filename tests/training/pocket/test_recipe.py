"""The training code, where torch is installed: parity with transformers, and decoding with a cache."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

import models.pocket

pytestmark = [
    pytest.mark.reference,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch not installed"),
]


def test_the_torch_model_computes_what_transformers_computes() -> None:
    pytest.importorskip("transformers")
    from training.pocket.evaluation.check_parity import main

    main()


def test_decoding_with_a_cache_gives_what_whole_passes_give() -> None:
    import torch

    from training.pocket.evaluation.check_parity import SMALL, randomised
    from training.pocket.evaluation.generate import Request, decode_group
    from training.pocket.network.model import Pocket

    torch.manual_seed(1)
    model = randomised(Pocket(SMALL)).eval()
    requests = [Request(torch.randint(0, SMALL.vocab_size, (n,)).tolist(), 5) for n in (40, 22, 6)]
    for request, answer in zip(requests, decode_group(model, requests, set()), strict=True):
        ids = list(request.ids)
        for token in answer:
            with torch.no_grad():
                hidden, _ = model.hidden(torch.tensor([ids]), sparse=True)
            assert model.logits(hidden)[0, -1].argmax().item() == token
            ids.append(token)


def test_training_goes_on_from_exported_weights(tmp_path: Path) -> None:
    import torch
    from tokenizers import Tokenizer

    from training.pocket.evaluation.check_parity import SMALL, randomised
    from training.pocket.files.baking import bake
    from training.pocket.files.export import write_checkpoint
    from training.pocket.files.importing import load_shipped
    from training.pocket.network.model import Pocket

    torch.manual_seed(2)
    settings = replace(SMALL, intermediate_size=128, moe_intermediate_size=64)
    model = randomised(Pocket(settings)).eval()
    tokenizer = Tokenizer.from_file(str(Path(models.pocket.__file__).parent / "tokenizer.json"))
    write_checkpoint(model, tokenizer, tmp_path)
    bake(model)
    read = load_shipped(tmp_path, "cpu", settings).state_dict()
    assert all(torch.allclose(read[name], value, atol=1e-6) for name, value in model.state_dict().items())
