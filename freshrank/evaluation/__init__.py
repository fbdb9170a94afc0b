"""Numbers only: metrics, intervals, the gate."""
