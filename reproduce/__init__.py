"""Published experiments in private variational inference, repeated with dpoptax."""
