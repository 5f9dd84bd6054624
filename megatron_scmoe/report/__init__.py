"""What a step's communication took: report files, the log's lines, figures for TensorBoard and W&B."""
