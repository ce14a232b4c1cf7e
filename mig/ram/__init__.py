"""The savevm handler of guest memory: the `ram` section."""
