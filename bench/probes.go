// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	"github.com/vishvananda/netlink"

	"github.com/plimsoll-bench/plimsoll/clusters"
)

// The smallest rules that use all of the kernel's parts that kube-proxy's rules use in each mode.
const (
	iptablesProbe = `*filter
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment probe -m mark --mark 0x4000/0x4000 -j REJECT
COMMIT
*nat
-A OUTPUT -d 198.19.0.1/32 -p tcp -m tcp --dport 80 -m statistic --mode random --probability 0.5 -j DNAT --to-destination 198.18.0.1:80
-A POSTROUTING -m addrtype ! --dst-type LOCAL -j MARK --or-mark 0x4000
-A POSTROUTING -j MASQUERADE --random-fully
COMMIT
`
	nftablesProbe = `table ip probe {
	map services {
		type ipv4_addr . inet_proto . inet_service : verdict
		elements = { 198.19.0.1 . tcp . 80 : goto endpoint }
	}
	chain endpoint {
		numgen random mod 2 vmap { 0 : drop, 1 : return }
		meta l4proto tcp dnat to 198.18.0.1:80
	}
	chain output {
		type nat hook output priority -100;
		ct state new ip daddr . meta l4proto . th dport vmap @services
	}
	chain postrouting {
		type nat hook postrouting priority 100;
		masquerade fully-random
	}
}
`
)

const installCure = "plimsoll doctor --install"

// kernelProbes are tried by root, in a network namespace that is gone afterwards.
var kernelProbes = []struct {
	what string
	try  func(ctx context.Context, ns *clusters.NetNS) finding
}{
	{"veth", tryVeth},
	{"iptables-nft", func(ctx context.Context, ns *clusters.NetNS) finding {
		return tryRules(ctx, ns, iptablesProbe, "set up a kernel with nf_tables", "xtables-nft-multi", "iptables-restore")
	}},
	{"iptables-legacy", func(ctx context.Context, ns *clusters.NetNS) finding {
		f := tryRules(ctx, ns, iptablesProbe, "", "xtables-legacy-multi", "iptables-restore")
		if f.state == lacks && f.cure == "" {
			f.detail = "mode iptables-legacy will be skipped: " + f.detail
		}
		return f
	}},
	{"nftables", func(ctx context.Context, ns *clusters.NetNS) finding {
		return tryRules(ctx, ns, nftablesProbe, "set up a kernel with nf_tables", "nft", "-f", "-")
	}},
	{"ip_vs", tryIPVS},
	{"ebpf", tryBPF},
}

// examineKernel tries the kernel's parts. Without root nothing can be told.
func examineKernel(ctx context.Context, root bool) []finding {
	var ns *clusters.NetNS
	if root {
		var err error
		if ns, err = clusters.NewNetNS(); err != nil {
			return []finding{{"network namespaces", lacks, err.Error(), "run it as root outside a container, or in a privileged one"}}
		}
		defer ns.Close()
	}
	var findings []finding
	for _, p := range kernelProbes {
		f := finding{state: unknown, detail: "needs root"}
		if ns != nil {
			f = p.try(ctx, ns)
		}
		f.what = p.what
		findings = append(findings, f)
	}
	return findings
}

// tryVeth makes the pair of links that a pod is reached by.
func tryVeth(_ context.Context, ns *clusters.NetNS) finding {
	handle, err := ns.Netlink()
	if err == nil {
		defer handle.Close()
		err = handle.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "probe0"}, PeerName: "probe1"})
	}
	if err != nil {
		return finding{state: lacks, detail: err.Error(), cure: "set up a kernel with veth"}
	}
	return finding{state: has, detail: "links between network namespaces"}
}

// tryRules feeds rules to a command inside the namespace. A missing command is cured by installing it, a kernel that
// refuses the rules by kernelCure; empty when a run goes on without.
func tryRules(ctx context.Context, ns *clusters.NetNS, rules, kernelCure string, command string, args ...string) finding {
	path := lookUp(command)
	if path == "" {
		return finding{state: lacks, detail: command + " is not installed", cure: installCure}
	}
	scratch, err := os.MkdirTemp("", "plimsoll-doctor-")
	if err != nil {
		return finding{state: unknown, detail: err.Error()}
	}
	defer os.RemoveAll(scratch)

	var said []byte
	err = ns.Do(func() error {
		cmd := exec.CommandContext(ctx, path, args...)
		cmd.Stdin = strings.NewReader(rules)
		// The legacy tool would take the host's lock otherwise (1.8.9 or newer reads this).
		cmd.Env = append(os.Environ(), "XTABLES_LOCKFILE="+filepath.Join(scratch, "lock"))
		var err error
		said, err = cmd.CombinedOutput()
		return err
	})
	if err != nil {
		return finding{state: lacks, detail: fmt.Sprintf("%s: %v%s", command, err, lastComplaint(string(said))), cure: kernelCure}
	}
	return finding{state: has, detail: path}
}

// tryIPVS asks for the kernel's IPVS by its generic netlink family.
func tryIPVS(_ context.Context, ns *clusters.NetNS) finding {
	handle, err := ns.Netlink()
	if err == nil {
		defer handle.Close()
		_, err = handle.GenlFamilyGet("IPVS")
	}
	switch {
	case err != nil:
		return finding{state: lacks, detail: "mode ipvs will be skipped: this kernel has no IPVS (" + err.Error() + ")"}
	case lookUp("ipset") == "":
		return finding{state: lacks, detail: "mode ipvs will be skipped: ipset is not installed (" + installCure + ")"}
	}
	return finding{state: has, detail: "with " + lookUp("ipset")}
}

// tryBPF loads the smallest programs of the kind that the eBPF load balancer consists of.
func tryBPF(context.Context, *clusters.NetNS) finding {
	cure := "set up a kernel of Linux 5.18 or newer with CONFIG_CGROUP_BPF"
	// bpf_set_retval lets connect(2) fail with an errno of the program's choice.
	if err := features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnSetRetval); errors.Is(err, ebpf.ErrNotSupported) {
		return finding{state: lacks, detail: "no programs at a cgroup's connect with bpf_set_retval: " + err.Error(), cure: cure}
	} else if err != nil {
		return finding{state: lacks, detail: err.Error(), cure: "run it as root with CAP_BPF, outside a container"}
	}
	detail := []string{"programs at a cgroup's connect"}
	f := finding{state: has}
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
