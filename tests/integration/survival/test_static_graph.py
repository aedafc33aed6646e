"""DDP that assumes that every step uses the same parameters, with accumulation and recomputed activations."""

from hdm_lightning.training.checkpoint_io import checkpoints_in, read_checkpoint

ROUNDING = 1e-5


def first_moments(toy, number):
    """After one step, the gradient times 1 - beta1."""
    state = read_checkpoint(checkpoints_in(toy.stage_folder(number) / "checkpoints")[-1])["optimizer_states"][0][
        "state"
    ]
    return {key: moments["exp_avg"] for key, moments in state.items()}


def furthest(first, second):
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def test_a_static_graph_has_the_gradients_of_any_other_and_trains_on(toy, server):
    """A step of two micro-batches on each process; one of a single micro-batch; and several with the weights' end."""
    stages = {
        "two": {"samples": 8, "activation_checkpointing": True},
        "one": {"samples": 8, "micro_batch_size": 4},
        "more": {"samples": 32, "resolution": 24, "activation_checkpointing": True},
    }
    plain, static = (
        toy(name, stages, trainer={"accelerator": "cpu", "strategy": strategy, "log_every_n_steps": 2})
        for name, strategy in (("plain", "ddp"), ("static", "ddp_static_graph"))
    )
    assert server.run(plain, ranks=2) == [0, 0]
    assert server.run(static, ranks=2) == [0, 0], server.log.read_text()
    for stage in (1, 2):
        expected = first_moments(plain, stage)
        size = max(float(value.abs().max()) for value in expected.values())
        assert size > 0 and furthest(expected, first_moments(static, stage)) < ROUNDING * size
    assert furthest(plain.end(3), static.end(3)) < 10 * ROUNDING
