"""A web page of one's own models, runs and shards: draw, look through trainings, browse and mark samples, plan."""
