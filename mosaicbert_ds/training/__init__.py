"""The engine and the loop around it: plan, optimizer, DeepSpeed, checkpoints, telemetry."""
