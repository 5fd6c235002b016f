"""The mathematics: pure functions of tensors, each one equation, none of which knows a config, a rank or a model."""
