# `make images`: docker buildx bake --file helm/images/docker-bake.hcl, from the root of the checkout.

variable "REGISTRY" {
  default = "freshrank"
}

variable "VERSION" {
  default = "0.1.0"
}

# Of the commit that is built, and when: `make images` fills them in.
variable "REVISION" {
  default = ""
}

variable "CREATED" {
  default = ""
}

# What all three are built upon; with `@sha256:...` behind the tag it is one build of it for good.
variable "PYTHON_IMAGE" {
  default = "python:3.11.13-slim-bookworm"
}

# Index of another build of torch; empty: that of the configured index, on Linux the one with CUDA.
variable "TORCH_INDEX" {
  default = ""
}

group "default" {
  targets = ["freshrank", "triton", "airflow"]
}

target "common" {
  context    = "."
  dockerfile = "helm/images/Dockerfile"
  args = {
    PYTHON_IMAGE = PYTHON_IMAGE
    REVISION     = REVISION
    VERSION      = VERSION
    CREATED      = CREATED
  }
}

target "freshrank" {
  inherits = ["common"]
  target   = "freshrank"
  tags     = ["${REGISTRY}/freshrank:${VERSION}"]
  args = {
    TORCH_INDEX = TORCH_INDEX
  }
}

target "triton" {
  inherits = ["common"]
  target   = "triton"
  tags     = ["${REGISTRY}/triton:${VERSION}"]
}

target "airflow" {
  inherits = ["common"]
  target   = "airflow"
  tags     = ["${REGISTRY}/airflow:${VERSION}"]
  args = {
    TORCH_INDEX = TORCH_INDEX
  }
}
