// Where the facts come from that `tests/contract.rs` holds our .proto files against. Nothing is built from here.
module lamina.dev/contract

go 1.26.0

require (
	github.com/container-storage-interface/spec v1.12.0
	k8s.io/kubelet v0.36.3
)
