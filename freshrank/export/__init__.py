"""Calibration, exposure parity and the ONNX export."""
