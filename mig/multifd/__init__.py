"""multifd: pages in packets over several connections beside the main one."""
