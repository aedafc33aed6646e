"""What a run tells while it goes: TensorBoard, progress bar, times, memory."""
