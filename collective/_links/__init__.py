"""Links: `mux` over the carriers `memory` and `stream`, and `endpoint`, where they begin. See `collective.links`."""
