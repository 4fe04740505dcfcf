"""Published experiments of DP variational inference, run again with dpoptax."""
