"""The same numbers over a real network, with the server killed in the middle."""

from served_world import CONFIG, PLAN, Served
from split_world import World

from blindtune.split.customer.requests import train
from blindtune.split.customer.ushape import Top, train_u_shape


def test_two_part_over_tls_with_a_restart(tmp_path):
    (tmp_path / "calm").mkdir()
    calm, served = World(tmp_path / "calm"), Served(tmp_path / "tls")
    expected = train(calm.job(CONFIG, precision="float16"), calm.private(), PLAN)

    def restart(_loss, seen=[]):  # noqa: B006
        seen.append(1)
        if len(seen) == 5:
            served.start()

    try:
        job = served.job(task="classification", outputs=2)
        assert train(job, served.world.private(), PLAN, on_loss=restart) == expected
        job.close()
        assert served.world.life == 2
    finally:
        served.server.close(0)


def test_u_shape_over_tls(tmp_path):
    (tmp_path / "calm").mkdir()
    calm = World(tmp_path / "calm", "smollm2", "u-shape", cut=1, last=1)
    served = Served(tmp_path / "tls", "smollm2", "u-shape", cut=1, last=1)
    losses = []
    try:
        for job, world in (
            (calm.job(CONFIG, precision="float16"), calm),
            (served.job(task="hidden"), served.world),
        ):
            top = Top(world.bottom, None)
            losses.append(train_u_shape(job, top, world.private(), PLAN, language_model=True))
            job.close()
    finally:
        served.server.close(0)
    assert losses[0] == losses[1]
