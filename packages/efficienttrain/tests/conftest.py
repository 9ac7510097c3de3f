pytest_plugins = ["leap_shared.testing.plugin"]
