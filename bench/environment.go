// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plimsoll-bench/plimsoll/results"
)

// readSysctls are host-wide values that shape what is measured. They are read, never set.
var readSysctls = []string{
	"net/netfilter/nf_conntrack_max", "net/netfilter/nf_conntrack_buckets", "net/core/bpf_jit_enable", "net/core/bpf_jit_harden",
	"net/core/somaxconn", "fs/inotify/max_user_instances", "net/ipv4/ip_local_port_range", "kernel/bpf_stats_enabled", "kernel/unprivileged_bpf_disabled",
}

// describeHost reads what a reader of results must know of the machine. What cannot be read is left empty.
func describeHost(ctx context.Context, bin string) results.Environment {
	env := results.Environment{
		GOOS: runtime.GOOS, GOARCH: runtime.GOARCH, Go: runtime.Version(), NumCPU: runtime.NumCPU(),
		CPU: cpuInfo("model name"), Commit: strings.TrimSuffix(commit, "-dirty"), Dirty: strings.HasSuffix(commit, "-dirty"),
		Versions: map[string]string{"plimsoll": version}, Sysctls: map[string]string{},
	}
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		env.Kernel = unix.ByteSliceToString(uts.Release[:])
	}
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		env.MemoryBytes = int64(info.Totalram) * int64(info.Unit)
	}
	for name, argv := range map[string][]string{
		"kubernetes": {filepath.Join(bin, "kube-proxy"), "--version"},
		"etcd":       {filepath.Join(bin, "etcd"), "--version"},
		"iptables":   {"iptables", "--version"},
		"nft":        {"nft", "--version"},
	} {
		env.Versions[name] = firstLine(ctx, argv)
	}
	for _, name := range readSysctls {
		if b, err := os.ReadFile("/proc/sys/" + name); err == nil {
			env.Sysctls[strings.ReplaceAll(name, "/", ".")] = strings.TrimSpace(string(b))
		}
	}
	env.Extra = describeCPU()
	return env
}

// describeCPU is what makes entering the kernel dear or cheap: mitigations of the CPU's weaknesses, and whether its TLB outlives a
// change of page tables. Without that, page-table isolation empties it at every system call, and each look-up in a large map pays.
func describeCPU() map[string]string {
	all := map[string]string{}
	files, _ := filepath.Glob("/sys/devices/system/cpu/vulnerabilities/*")
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(b), "Mitigation: ") {
			all["mitigation of "+filepath.Base(f)] = strings.TrimSpace(strings.TrimPrefix(string(b), "Mitigation: "))
		}
	}
	if flags := strings.Fields(cpuInfo("flags")); len(flags) > 0 {
		all["TLB with address space numbers (pcid)"] = "no"
		if slices.Contains(flags, "pcid") {
			all["TLB with address space numbers (pcid)"] = "yes"
		}
	}
	return all
}

// firstLine is the first line that a command prints; empty when it fails.
func firstLine(ctx context.Context, argv []string) string {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).Output()
	if err != nil {
		return ""
	}
	line, _, _ := bytes.Cut(out, []byte("\n"))
	return strings.TrimSpace(string(line))
}

// cpuInfo is the first value of that name in /proc/cpuinfo; empty where the architecture prints none.
func cpuInfo(wanted string) string {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return ""
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if name, value, ok := strings.Cut(s.Text(), ":"); ok && strings.TrimSpace(name) == wanted {
			return strings.TrimSpace(value)
		}
	}
	return ""
}
