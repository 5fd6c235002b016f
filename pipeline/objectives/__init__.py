"""The mathematics: pure functions of tensors, each one equation, independent of configs, ranks and models."""
