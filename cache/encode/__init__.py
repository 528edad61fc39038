"""The encoding pipeline: work list, decoder, encoders, writer, sinks, progress, and time estimate."""
