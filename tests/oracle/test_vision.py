"""Image models against torch: transformers' ResNet and ViT, batch statistics, losses, and a real CIFAR-10 ResNet-20."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from ftjax import config, load_pretrained  # noqa: E402
from ftjax.data.images import ImageBatch, resize  # noqa: E402
from ftjax.headspec import HeadSpec  # noqa: E402
from ftjax.models import hf  # noqa: E402
from ftjax.models.batchnorm import reestimate  # noqa: E402
from ftjax.models.resnet_cifar import CIFAR10, convert  # noqa: E402
from ftjax.objectives.image_classification import ImageClassification  # noqa: E402
from ftjax.peft.full import Full  # noqa: E402
from tests import tiny  # noqa: E402
from tests.oracle import apart, named, relative  # noqa: E402

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

RESNETS = {
    "basic, two channels": dict(
        layer_type="basic", num_channels=2, embedding_size=6, hidden_sizes=[6, 10, 14], depths=[1, 2, 1], num_labels=5,
    ),
    "bottleneck, strided 1 x 1, small first stage": dict(
        layer_type="bottleneck", embedding_size=8, hidden_sizes=[12, 24], depths=[2, 1], num_labels=3,
        downsample_in_first_stage=True, downsample_in_bottleneck=True,
    ),
    "bottleneck, gelu, one label per digit": dict(
        layer_type="bottleneck", embedding_size=10, hidden_sizes=[20, 12], depths=[1, 2], num_labels=10,
        hidden_act="gelu",
    ),
}  # fmt: skip
VITS = {
    "no qkv bias, relu, two channels": dict(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40, image_size=20, patch_size=5,
        num_channels=2, qkv_bias=False, hidden_act="relu", num_labels=5,
    ),
    "one layer, one patch and a rest": dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=10, image_size=11, patch_size=7,
        layer_norm_eps=1e-3, num_labels=2,
    ),
    "many heads": dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=8, intermediate_size=48, image_size=12, patch_size=3,
        hidden_act="gelu_new", num_labels=7,
    ),
}  # fmt: skip
SIZE = 41  # odd, so that every stride leaves a rest


def pixels(n: int, channels: int, size: int, seed: int = 0) -> np.ndarray:
    """Random images of unequal brightness."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, channels, size, size)) + rng.normal(size=(n, 1, 1, 1))
    return x.astype(np.float32)


def torch_resnet(**changes):
    """A ResNet with every parameter drawn at random and running statistics that fit it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**changes))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim < 4:
                p.copy_(torch.randn_like(p) * 0.3 + ("normalization.weight" in name))
        for seed in range(10):
            model.train()(torch.tensor(pixels(4, model.config.num_channels, SIZE, seed + 100)))
    return model.eval()


def torch_vit(**changes):
    """A ViT with every parameter drawn at random."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    numbers = {"hidden_dropout_prob": 0.0, "attn_implementation": "eager"} | changes
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**numbers))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.3 + ("layernorm" in name and name.endswith("weight")))
    return model.eval()


@pytest.fixture(params=RESNETS, scope="module")
def resnet(request, tmp_path_factory):
    """(torch model, its folder) for each odd configuration."""
    folder = tmp_path_factory.mktemp("resnet")
    model = torch_resnet(**RESNETS[request.param])
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(params=[*RESNETS, *VITS], scope="module")
def pair(request, tmp_path_factory):
    """(torch model, its folder) of either kind."""
    name, folder = request.param, tmp_path_factory.mktemp("pair")
    model = torch_resnet(**RESNETS[name]) if name in RESNETS else torch_vit(**VITS[name])
    model.save_pretrained(folder)
    return model, folder


def images_for(theirs, n: int = 3, seed: int = 0) -> np.ndarray:
    return pixels(n, theirs.config.num_channels, getattr(theirs.config, "image_size", SIZE), seed)


def torch_logits(theirs, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return theirs(pixel_values=torch.tensor(x)).logits.numpy()


def our_logits(model, params, x: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(lambda p, x: model.apply(p, {"pixel_values": x}).logits)(params, x))


def objective_of(classes: int) -> ImageClassification:
    """Smoothed and with unequal class weights, so that each is seen to count."""
    return ImageClassification(label_smoothing=0.1, class_weights=tuple(0.5 + i for i in range(classes)))


def compare_loss_and_gradients(theirs, folder, *, train: bool):
    """Losses, all gradients, and (ours, theirs) new statistics."""
    model, params = hf.load(str(folder))
    x, n = images_for(theirs, 4), theirs.config.num_labels
    labels = np.arange(4) % n
    objective = objective_of(n)
    batch = ImageBatch(jnp.asarray(x), jnp.asarray(labels, jnp.int32), jnp.ones(4, jnp.float32))

    def loss(p):
        def policy(inputs, mutable):
            out = model.apply(p, inputs, train=train)
            return out, out.mutable

        hyper = {"label_smoothing": jnp.float32(0.1)}
        out = objective(policy, batch, reference=None, mutable={}, hyper=hyper)
        return out.sums["cross_entropy"] / objective.weights(batch)["cross_entropy"], out.mutable

    (value, new), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    theirs.train(train)
    theirs.zero_grad()
    weights = torch.tensor(objective.class_weights)
    logits = theirs(pixel_values=torch.tensor(x)).logits
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(labels), weight=weights, label_smoothing=0.1)
    expected.backward()
    theirs.eval()

    assert abs(float(value) - expected.item()) < 1e-5 * abs(expected.item())
    stats = {k for k, s in model.table.items() if s.kind == "stat"}
    ours = dict(named(model.table, {k: v for k, v in grads.items() if k not in stats}))
    want = {hf_name(name): p.grad.numpy() for name, p in theirs.named_parameters()}
    assert set(ours) == set(want)
    still = {k for k in want if k.endswith("attention.key.bias")}  # shifts all scores alike: its gradient is 0
    assert all(np.abs(x[k]).max() < 1e-6 for k in still for x in (ours, want))
    gaps = {k: relative(ours[k], want[k]) for k in want.keys() - still}
    assert max(gaps.values()) < 1e-3, {k: v for k, v in gaps.items() if v >= 1e-3}
    return model, new, max(gaps.values())


def hf_name(name: str) -> str:
    """The name in the file of a parameter of transformers' ViT, which renames on loading; others are the same."""
    for now, then in (
        ("vit.layers.", "vit.encoder.layer."), ("attention.q_proj", "attention.attention.query"),
        ("attention.k_proj", "attention.attention.key"), ("attention.v_proj", "attention.attention.value"),
        ("attention.o_proj", "attention.output.dense"), ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"),
    ):  # fmt: skip
        name = name.replace(now, then)
    return name


def test_logits(pair, record_property):
    theirs, folder = pair
    model, params = hf.load(str(folder))
    x = images_for(theirs)
    expected = torch_logits(theirs, x)
    gap = apart(our_logits(model, params, x), expected)
    record_property("max_abs", gap)
    assert np.abs(expected).max() > 0.5 and expected.std(0).max() > 0.05, "all images would have these logits"
    assert gap < 1e-4


def test_loss_and_every_gradient(pair, record_property):
    record_property("largest_relative", compare_loss_and_gradients(*pair, train=False)[2])


def test_training_mode(resnet, record_property):
    """Batch statistics: loss, every gradient, and the running statistics after it."""
    theirs, folder = resnet
    before = {k: v.clone() for k, v in theirs.state_dict().items()}
    try:
        model, new, gap = compare_loss_and_gradients(theirs, folder, train=True)
        record_property("largest_relative", gap)
        after = theirs.state_dict()
        assert len(new) == sum(k.endswith(("running_mean", "running_var")) for k in after)
        for key, value in new.items():
            name = model.table[key].hf
            assert relative(np.asarray(value), after[name].numpy()) < 1e-5, key
            assert relative(np.asarray(value), before[name].numpy()) > 1e-4, "nothing moved"
    finally:
        theirs.load_state_dict(before)


def test_steps_of_the_trainer_equal_torchs(resnet):
    """Three SGD steps of two micro-batches through the one train step: weights and statistics."""
    theirs, folder = resnet
    before = {k: v.clone() for k, v in theirs.state_dict().items()}
    model, base = hf.load(str(folder))
    n = theirs.config.num_labels
    x, labels = images_for(theirs, 8).reshape(2, 4, theirs.config.num_channels, SIZE, SIZE), np.arange(8) % n
    optim = config.Optim(name="sgd", lr=0.05, b1=0.9, clip=0.0, schedule="constant")
    t = tiny.tiny(Full(), ImageClassification(), model=model, base=base, optim=optim)
    batch = ImageBatch(jnp.asarray(x), jnp.asarray(labels.reshape(2, 4), jnp.int32), jnp.ones((2, 4), jnp.float32))
    step, state = jax.jit(t.program.train), t.state
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=0.9)
    try:
        theirs.train()
        for _ in range(3):
            state, metrics = step(state, t.frozen, batch)
            sgd.zero_grad()
            total = 0.0
            for micro, y in zip(x, labels.reshape(2, 4), strict=True):
                loss = torch.nn.functional.cross_entropy(theirs(torch.tensor(micro)).logits, torch.tensor(y)) / 2
                loss.backward()
                total += loss.item()
            sgd.step()
            assert abs(float(metrics["loss"]) - total) < 1e-4 * total
        after = {k: v for k, v in theirs.state_dict().items() if "tracked" not in k}
        ours = dict(named(model.table, {**state.trainable["base"], **state.mutable}))
        assert set(ours) == set(after)
        assert max(relative(ours[k], after[k].numpy()) for k in after) < 1e-3
    finally:
        theirs.eval().load_state_dict(before)


def test_reestimated_statistics_equal_torchs(resnet, tmp_path):
    theirs, folder = resnet
    before = {k: v.clone() for k, v in theirs.state_dict().items()}
    model, params = hf.load(str(folder))
    batches = [images_for(theirs, 4, seed) for seed in (1, 2, 3)]
    params = reestimate(model, params, ({"pixel_values": jnp.asarray(x)} for x in batches))
    try:
        torch.optim.swa_utils.update_bn([torch.tensor(x) for x in batches], theirs)
        after = theirs.state_dict()
        stats = [k for k, s in model.table.items() if s.kind == "stat"]
        assert max(relative(np.asarray(params[k]), after[model.table[k].hf].numpy()) for k in stats) < 1e-5
    finally:
        theirs.eval().load_state_dict(before)
        for m in theirs.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.momentum = 0.1


def test_saved_and_reopened_by_transformers(pair, tmp_path):
    theirs, folder = pair
    model, params = hf.load(str(folder))
    hf.save(model, params, tmp_path)
    again, info = type(theirs).from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    x = images_for(theirs)
    np.testing.assert_array_equal(torch_logits(again.eval(), x), torch_logits(theirs, x))
    back, _ = hf.load(str(tmp_path))
    assert back == model


@pytest.mark.parametrize("n", [8, 5])
def test_enlarging_equals_torchs(n):
    x = np.random.default_rng(0).normal(size=(2, 3, n, n)).astype(np.float32)
    want = torch.nn.functional.interpolate(torch.tensor(x), size=(32, 32), mode="bilinear", align_corners=False)
    assert apart(resize(x, 32), want.numpy()) < 1e-5


# A real model --------------------------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    """A block of the CIFAR ResNet, in torch."""

    def __init__(self, inner: int, out: int, stride: int):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(inner, out, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(out)
        self.conv2 = torch.nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(out)
        self.stride, self.new = stride, out - inner

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        short = x[:, :, :: self.stride, :: self.stride]
        return (y + torch.nn.functional.pad(short, (0, 0, 0, 0, self.new // 2, self.new // 2))).relu()


class ResNet20(torch.nn.Module):
    """The network whose tensors the file holds."""

    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(16)
        for i, (inner, out) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            first = Block(inner, out, 1 if i == 1 else 2)
            setattr(self, f"layer{i}", torch.nn.Sequential(first, Block(out, out, 1), Block(out, out, 1)))
        self.linear = torch.nn.Linear(64, 10)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


@pytest.fixture(scope="module")
def network():
    return ResNet20()


def test_the_real_resnet20(shared, tmp_path, record_property, network):
    from safetensors.torch import load_file

    source = shared / "vision" / "resnet20_cifar10.safetensors"
    missing, extra = network.load_state_dict(load_file(source), strict=False)
    assert not extra and all("num_batches_tracked" in name for name in missing)
    model, params = load_pretrained(str(convert(source, tmp_path)))
    assert model.head == HeadSpec("image_classification", CIFAR10)
    x = pixels(8, 3, 32)
    with torch.no_grad():
        expected = network.eval()(torch.tensor(x)).numpy()
    gap = apart(our_logits(model, params, x), expected)
    record_property("max_abs", gap)
    assert np.abs(expected).max() > 1 and gap < 1e-4
    ours = model.apply(params, {"pixel_values": jnp.asarray(x)}, train=True)
    assert apart(np.asarray(ours.logits), network.train()(torch.tensor(x)).detach().numpy()) < 1e-4
    hf.save(model, params, tmp_path / "again")
    network.load_state_dict(load_file(tmp_path / "again" / "model.safetensors"), strict=True)
