"""A small size of the stress tests of inputs; `make stress` runs the full one."""

from stress import convolutions, mutations


def test_mutated_configs_and_command_lines():
    assert mutations.run(200, seed=1) == []


def test_random_convolution_calls():
    assert convolutions.run(500, seed=2) == []
