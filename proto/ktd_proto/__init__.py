"""Generated classes of the ktd wire protocol (`ktd_proto/v1/engine.proto` is the source)."""
