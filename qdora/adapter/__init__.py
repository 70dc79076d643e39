"""The layers: a frozen, possibly quantised linear map, and the adapted linear map on top of it."""
