"""Softmax, log-softmax and log-sum-exp: functions of the rows of an array."""
