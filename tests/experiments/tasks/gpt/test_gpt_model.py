import pytest
import torch
import torch.nn.functional as F

from experiments.tasks.gpt.gpt_model import GPT, ModelSettings


def make(**changed):
    torch.manual_seed(0)
    settings = ModelSettings(**{"layers": 2, "dim": 12, "heads": 3} | changed)
    model = GPT(settings, vocabulary=40, context=10).double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero at first, where a wrong one would not show
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def by_hand(model, tokens, heads):
    """The decoder position by position, from its weights alone: no module is called."""
    weights = dict(model.named_parameters())

    def affine(name, x):
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    def norm(name, x):
        x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
        return weights[f"{name}.weight"] * x + weights[f"{name}.bias"]

    xs = [
        weights["tokens.weight"][token] + weights["positions.weight"][place]
        for place, token in enumerate(tokens.tolist())
    ]
    for number in range(len(model.blocks)):
        block = f"blocks.{number}"
        parts = [affine(f"{block}.attention.qkv", norm(f"{block}.attention_norm", x)).chunk(3) for x in xs]
        attended = []
        for place in range(len(xs)):
            q = parts[place][0].view(heads, -1)
            k, v = (torch.stack([part[which].view(heads, -1) for part in parts[: place + 1]]) for which in (1, 2))
            shares = torch.softmax((k * q).sum(-1) / q.shape[1] ** 0.5, dim=0)
            attended.append((shares[..., None] * v).sum(0).flatten())
        xs = [x + affine(f"{block}.attention.out", each) for x, each in zip(xs, attended, strict=True)]
        inner = [affine(f"{block}.up", norm(f"{block}.feed_forward_norm", x)) for x in xs]
        cubic = [0.5 * u * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3))) for u in inner]
        xs = [x + affine(f"{block}.down", each) for x, each in zip(xs, cubic, strict=True)]
    return torch.stack([weights["tokens.weight"] @ norm("norm", x) for x in xs])


def test_the_decoder_is_gpt2s_written_out_by_hand():
    model, tokens = make(), torch.randint(40, (2, 7))
    expected = torch.stack([by_hand(model, row, heads=3) for row in tokens])
    torch.testing.assert_close(model(tokens), expected, rtol=1e-10, atol=1e-12)


def test_no_position_sees_what_follows():
    model, tokens = make(), torch.randint(40, (1, 10))
    changed = tokens.clone()
    changed[0, 6] = (tokens[0, 6] + 1) % 40
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.isclose(before[:, 6:], after[:, 6:]).all(-1).any()


def test_the_head_is_the_token_embedding():
    model = make()
    model(torch.randint(40, (2, 5))).sum().backward()
    assert sum(parameter.numel() for parameter in model.parameters()) == (
        40 * 12 + 10 * 12 + 2 * (12 * 36 + 36 + 12 * 12 + 12 + 2 * 12 * 48 + 48 + 12 + 4 * 12) + 2 * 12
    )
    assert (model.tokens.weight.grad != 0).all(dim=1).all()  # a token that was not looked up has one from the head


def test_gpt2_small_has_its_published_number_of_parameters():
    with torch.device("meta"):
        model = GPT(ModelSettings(), vocabulary=50257, context=1024)
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808


def test_weights_are_drawn_as_gpt2s():
    torch.manual_seed(0)
    model = GPT(ModelSettings(layers=8, dim=96, heads=3), vocabulary=500, context=64)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            std = 0.02 / 4 if name.endswith(("out.weight", "down.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
        else:
            assert (parameter == (1.0 if "norm.weight" in name else 0.0)).all(), name


def test_an_untrained_model_gives_every_token_about_the_same_chance():
    torch.manual_seed(0)
    model = GPT(ModelSettings(layers=2, dim=96, heads=3), vocabulary=500, context=64)
    tokens = torch.randint(500, (4, 64))
    loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(torch.tensor(500.0).log().item(), rel=0.02)


def test_dropout_is_for_training_alone():
    model, tokens = make(dropout=0.5), torch.randint(40, (2, 7))
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layers": 0}, "layers = 0"),
        ({"dim": 0}, "dim = 0"),
        ({"heads": 5}, "dim = 12: must be a multiple of heads = 5"),
        ({"dropout": 1.0}, "dropout = 1.0"),
    ],
)
def test_a_setting_out_of_range_is_named(changed, message):
    with pytest.raises(ValueError, match=message):
        make(**changed)
