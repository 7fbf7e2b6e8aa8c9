"""Softmax, log-softmax, log-sum-exp and norms: functions of the rows of an array."""
