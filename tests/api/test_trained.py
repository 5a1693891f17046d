"""What is said of a training loss."""

from lorahub_registry.api.trained import risen


def test_a_loss_that_rose_is_told_and_noise_is_not():
    falling = [(step, 2.0 - step / 50) for step in range(1, 31)]
    rising = [(step, 1.7 + step / 10) for step in range(1, 31)]
    assert risen(falling) == []
    assert risen([(step, 2.0 + 0.1 * (step % 2)) for step in range(1, 31)]) == []
    assert risen(rising[:5]) == []
    assert risen(rising) == [
        "the training loss rose from 1.900 to 4.600: take a lower learning_rate"
    ]
