// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/clusters/host"
)

// What the default run wants of the host. At 20,000 Services kube-apiserver and etcd take 0.7 GB, and each of the node's
// proxies a few hundred MB.
const (
	wantMemory      = 2 << 30 // bytes available; with less it ends in the out-of-memory killer
	wantMemoryFull  = 8 << 30 // bytes available; for 50,000 Services
	wantDisk        = 1 << 30 // bytes free
	wantDiskToBuild = 6 << 30 // bytes free; for the build cache of a Kubernetes
	wantConntrack   = 65536   // entries; one a connection, for ten seconds after its end
)

// neededCapabilities are the bits of CapEff (linux/capability.h) that a run uses.
var neededCapabilities = map[int]string{
	5:  "CAP_KILL",
	12: "CAP_NET_ADMIN",
	21: "CAP_SYS_ADMIN",
}

// examineHost looks at who runs this, the kernel's version, the mounts, memory, processors and disk.
func examineHost(root bool) []finding {
	findings := []finding{examineRoot(root)}

	var uts unix.Utsname
	if err := unix.Uname(&uts); err == nil {
		findings = append(findings, finding{"kernel", has, unix.ByteSliceToString(uts.Release[:]) + " " + unix.ByteSliceToString(uts.Machine[:]), ""})
	}
	findings = append(findings, examineCgroup2(root), examineMemory())

	cpus := finding{"processors", has, strconv.Itoa(runtime.NumCPU()), ""}
	if runtime.NumCPU() < 2 {
		cpus.state, cpus.detail = note, "1: clients and servers share it, and figures for CPU will be coarse"
	}
	return append(findings, cpus, examineDisk(), examinePackages())
}

// examinePackages says which of a run's packages are missing. Whether the run is possible without them is for those who
// try to use them to say.
func examinePackages() finding {
	run, err := packagesOf(nil)
	if err != nil {
		return finding{"packages", unknown, err.Error(), ""}
	}
	var names []string
	for _, p := range missing(run) {
		names = append(names, p.name)
	}
	if names != nil {
		return finding{"packages", lacks, strings.Join(names, ", ") + " not installed (" + installCure + ")", ""}
	}
	return finding{"packages", has, "all that a run uses", ""}
}

func examineRoot(root bool) finding {
	f := finding{what: "root", state: has, detail: "with the capabilities that a run needs"}
	if !root {
		f.state, f.detail, f.cure = lacks, "a user cannot try the kernel: lines with ? need root", "run it as root (make bench uses sudo by itself)"
		return f
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		f.state, f.detail = unknown, err.Error()
		return f
	}
	if lost := missingCapabilities(string(status)); len(lost) > 0 {
		f.state, f.detail, f.cure = lacks, "without "+strings.Join(lost, ", "), "run it as root outside a container, or in a privileged one"
	}
	return f
}

// missingCapabilities reads CapEff in a /proc/PID/status and returns the needed capabilities that are not effective.
func missingCapabilities(status string) []string {
	for line := range strings.Lines(status) {
		hex, ok := strings.CutPrefix(line, "CapEff:")
		if !ok {
			continue
		}
		effective, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
		if err != nil {
			return nil
		}
		var lost []string
		for bit, name := range neededCapabilities {
			if effective&(1<<bit) == 0 {
				lost = append(lost, name)
			}
		}
		slices.Sort(lost)
		return lost
	}
	return nil
}

func examineCgroup2(root bool) finding {
	dir, err := clusters.Cgroup2Mount()
	switch {
	case errors.Is(err, clusters.ErrNotSupported):
		return finding{"cgroup2", lacks, err.Error(), "mount -t cgroup2 none DIR"}
	case err != nil:
		return finding{"cgroup2", unknown, err.Error(), ""}
	case root && unix.Access(dir, unix.W_OK) != nil:
		return finding{"cgroup2", lacks, dir + " is read-only", "run it outside a container, or in one with a cgroup2 of its own that it may write"}
	}
	return finding{"cgroup2", has, dir, ""}
}

func examineMemory() finding {
	f := finding{what: "memory", state: has}
	available, err := host.AvailableMemory()
	if err != nil {
		return finding{"memory", unknown, err.Error(), ""}
	}
	f.detail = fmt.Sprintf("%.1f GiB available", gib(available))
	switch {
	case available < wantMemory:
		f.state, f.cure = lacks, fmt.Sprintf("free memory: a run wants %d GiB available", wantMemory>>30)
	case available < wantMemoryFull:
		f.state = note
		f.detail += fmt.Sprintf("; PROFILE=full wants %d", wantMemoryFull>>30)
	}
	return f
}

func examineDisk() finding {
	var fs unix.Statfs_t
	if err := unix.Statfs(".", &fs); err != nil {
		return finding{"disk", unknown, err.Error(), ""}
	}
	free := fs.Bavail * uint64(fs.Bsize)
	f := finding{"disk", has, fmt.Sprintf("%.0f GiB free in this folder", gib(free)), ""}
	switch {
	case free < wantDisk:
		f.state, f.cure = lacks, fmt.Sprintf("free %d GiB of disk", wantDisk>>30)
	case free < wantDiskToBuild:
		f.state = note
		f.detail += fmt.Sprintf("; building Kubernetes wants %d where Go keeps its cache", wantDiskToBuild>>30)
	}
	return f
}

func gib(bytes uint64) float64 { return float64(bytes) / (1 << 30) }

// examineNoise says what may disturb the figures. None of it ends a run.
func examineNoise() []finding {
	var findings []finding
	if governors := cpuGovernors("/sys/devices/system/cpu"); len(governors) == 0 {
		findings = append(findings, finding{"cpu frequency", has, "not in this kernel's hands (a virtual machine, or fixed)", ""})
	} else if slices.Equal(governors, []string{"performance"}) {
		findings = append(findings, finding{"cpu frequency", has, "governor performance", ""})
	} else {
		findings = append(findings, finding{"cpu frequency", note,
			"governor " + strings.Join(governors, ", ") + ": figures settle down with cpupower frequency-set -g performance", ""})
	}

	if text, err := os.ReadFile("/proc/loadavg"); err == nil {
		load := finding{"load", has, "", ""}
		one, _, _ := strings.Cut(string(text), " ")
		load.detail = one + " in the last minute"
		if busy, err := strconv.ParseFloat(one, 64); err == nil && busy > float64(runtime.NumCPU())/4 {
			load.state = note
			load.detail += ": other work on this host makes the figures wide, and visits are repeated"
		}
		findings = append(findings, load)
	}

	conntrack := finding{"conntrack", has, "", ""}
	text, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_max")
	limit, parseErr := strconv.Atoi(strings.TrimSpace(string(text)))
	switch {
	case err != nil || parseErr != nil:
		conntrack.state, conntrack.detail = note, "the kernel counts no connections yet; its limit is known once a run has begun"
	case limit < wantConntrack:
		conntrack.state = note
		conntrack.detail = fmt.Sprintf("nf_conntrack_max is %d, for all namespaces together: more than %d connections in ten seconds are refused", limit, limit)
	default:
		conntrack.detail = fmt.Sprintf("nf_conntrack_max %d", limit)
	}
	return append(findings, conntrack)
}

// cpuGovernors returns the frequency governors in use below a sysfs folder for processors, sorted, each once.
func cpuGovernors(sysfs string) []string {
	paths, err := filepath.Glob(filepath.Join(sysfs, "cpu[0-9]*/cpufreq/scaling_governor"))
	if err != nil {
		panic(err) // the pattern is a constant
	}
	var governors []string
	for _, path := range paths {
		if text, err := os.ReadFile(path); err == nil {
			governors = append(governors, strings.TrimSpace(string(text)))
		}
	}
	slices.Sort(governors)
	return slices.Compact(governors)
}

// loadedModules lists the kernel's modules by name; nil for a kernel that knows no modules.
func loadedModules() []string {
	text, err := os.ReadFile("/proc/modules")
	if err != nil {
		return nil
	}
	return moduleNames(string(text))
}

// newModules are the names in after that are not in before.
func newModules(before, after []string) []string {
	return slices.DeleteFunc(after, func(name string) bool { return slices.Contains(before, name) })
}

// moduleNames returns the first word of each line of a /proc/modules.
func moduleNames(text string) []string {
	var names []string
	for line := range strings.Lines(text) {
		name, _, _ := strings.Cut(line, " ")
		names = append(names, name)
	}
	return names
}
