"""A web page for your models, runs and shards: generate images, follow runs, browse and mark samples, plan."""
