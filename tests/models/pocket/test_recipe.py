"""The training code, where torch is installed: parity with transformers, and decoding with a cache."""

import pytest

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.reference, pytest.mark.slow]


def test_the_torch_model_computes_what_transformers_computes() -> None:
    pytest.importorskip("transformers")
    from models.pocket.recipe.check_parity import main

    main()


def test_decoding_with_a_cache_gives_what_whole_passes_give() -> None:
    from models.pocket.recipe.check_parity import SMALL, randomised
    from models.pocket.recipe.generate import Request, decode_group
    from models.pocket.recipe.model import Pocket

    torch.manual_seed(1)
    model = randomised(Pocket(SMALL)).eval()
    requests = [Request(torch.randint(0, SMALL.vocab_size, (n,)).tolist(), 8) for n in (70, 33, 6)]
    for request, answer in zip(requests, decode_group(model, requests, set()), strict=True):
        ids = list(request.ids)
        for token in answer:
            with torch.no_grad():
                hidden, _ = model.hidden(torch.tensor([ids]), sparse=True)
            assert model.logits(hidden)[0, -1].argmax().item() == token
            ids.append(token)
