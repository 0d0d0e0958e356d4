// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"os"
	"strings"

	"github.com/cilium/ebpf/btf"
	"github.com/vishvananda/netlink"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/dataplane"
	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
)

// dispensable are the modes that many kernels come without. A default run shows them as skipped; without any other mode it
// does not answer its question, and the doctor says so beforehand.
var dispensable = map[string]bool{"iptables-legacy": true, "ipvs": true}

// examineKernel tries what nodes are made of, and asks each mode whether this kernel carries it. Without root nothing can
// be told.
func examineKernel(ctx context.Context, root bool) []finding {
	findings := []finding{{what: "veth"}, {what: "bpf"}}
	for _, m := range dataplane.Modes {
		findings = append(findings, finding{what: "mode " + m.Name()})
	}
	if !root {
		for i := range findings {
			findings[i].state, findings[i].detail = unknown, "needs root"
		}
		return findings
	}
	findings[0], findings[1] = tryVeth(), tryBPF()

	var carried []string
	var refused []int
	for i, m := range dataplane.Modes {
		f := &findings[2+i]
		f.state, f.detail = has, m.Doc()
		if err := m.Supported(ctx); err == nil {
			carried = append(carried, m.Name())
		} else if f.state, f.detail = lacks, "will be skipped: "+err.Error(); !dispensable[m.Name()] {
			refused = append(refused, 2+i)
		}
	}
	for _, i := range refused {
		findings[i].cure = "leave it out: make bench ARGS='--modes " + strings.Join(carried, ",") + "'"
		if packages, err := packagesOf(nil); err == nil && len(missing(packages)) > 0 {
			findings[i].cure = installCure
		}
	}
	return findings
}

// tryVeth makes, in a network namespace that is gone afterwards, the pair of links that a pod is reached by.
func tryVeth() finding {
	f := finding{what: "veth", state: has, detail: "links between network namespaces"}
	ns, err := clusters.NewNetNS()
	if err != nil {
		return finding{"veth", lacks, err.Error(), "run it as root outside a container, or in a privileged one"}
	}
	defer ns.Close()
	handle, err := ns.Netlink()
	if err != nil {
		return finding{"veth", unknown, err.Error(), ""}
	}
	defer handle.Close()
	if err := handle.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "probe0"}, PeerName: "probe1"}); err != nil {
		f.state, f.detail, f.cure = lacks, err.Error(), "set up a kernel with veth"
	}
	return f
}

// tryBPF says how well this kernel runs programs of the kind that the eBPF load balancer consists of.
func tryBPF() finding {
	if b, err := lb.Load(lb.Options{Services: 1, Backends: 1}); errors.Is(err, lb.ErrNotSupported) {
		return finding{"bpf", lacks, err.Error(), "set up a kernel of Linux 6.1 or newer with CONFIG_CGROUP_BPF"}
	} else if err != nil {
		return finding{"bpf", lacks, err.Error(), "run it as root with CAP_BPF, outside a container"}
	} else if err := b.Close(); err != nil {
		return finding{"bpf", unknown, err.Error(), ""}
	}
	f := finding{what: "bpf", state: has}
	detail := []string{"programs at a cgroup's connect"}
	if _, err := btf.LoadKernelSpec(); err != nil {
		detail = append(detail, "no BTF")
	} else {
		detail = append(detail, "BTF")
	}
	// 0 is the interpreter (admin-guide/sysctl/net.rst); a kernel with CONFIG_BPF_JIT_ALWAYS_ON has no 0.
	if jit, err := os.ReadFile("/proc/sys/net/core/bpf_jit_enable"); err != nil {
		f.state = note
		detail = append(detail, "no JIT: programs are interpreted, and slower")
	} else if strings.TrimSpace(string(jit)) == "0" {
		f.state = note
		detail = append(detail, "the JIT is off: programs are slower until sysctl net.core.bpf_jit_enable=1")
	} else {
		detail = append(detail, "JIT")
	}
	f.detail = strings.Join(detail, ", ")
	return f
}
