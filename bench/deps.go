package main

import (
	_ "github.com/HdrHistogram/hdrhistogram-go"
	_ "github.com/cilium/ebpf"
	_ "github.com/coreos/go-iptables/iptables"
	_ "github.com/schollz/progressbar/v3"
	_ "github.com/spf13/cobra"
	_ "github.com/vishvananda/netlink"
	_ "github.com/vishvananda/netns"
	_ "golang.org/x/perf/benchfmt"
	_ "golang.org/x/perf/benchmath"
	_ "golang.org/x/term"
	_ "gonum.org/v1/gonum/stat"
	_ "gonum.org/v1/plot"
	_ "k8s.io/client-go/kubernetes"
	_ "k8s.io/kubernetes/pkg/proxy"
	_ "sigs.k8s.io/knftables"
	_ "go.etcd.io/etcd/client/v3"
	_ "github.com/google/go-cmp/cmp"
	_ "golang.org/x/tools/txtar"
	_ "github.com/prometheus/common/expfmt"
)
func main() {}
