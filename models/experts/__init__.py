"""The routed experts of a layer: the router that chooses them, and the products that compute them."""
