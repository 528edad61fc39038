"""The DeepSpeed engine. The only room that talks to DeepSpeed."""
