// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/plimsoll-bench/plimsoll/dataplane"
)

func find(t *testing.T, findings []finding, what string) finding {
	t.Helper()
	i := slices.IndexFunc(findings, func(f finding) bool { return f.what == what })
	if i < 0 {
		t.Fatalf("nothing was found out about %s: %v", what, findings)
	}
	return findings[i]
}

// fakeBinaries fills a folder with programs that answer --version.
func fakeBinaries(t *testing.T, names ...string) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range names {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\necho "+name+" version $1\necho more\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestVerdict(t *testing.T) {
	fine := []finding{{"root", has, "", ""}, {"ip_vs", lacks, "mode ipvs will be skipped", ""}, {"load", note, "busy", ""}}
	if err := verdict(fine); err != nil {
		t.Errorf("what only costs a mode, or disturbs, stands in the way: %v", err)
	}
	err := verdict(append(fine,
		finding{"nftables", lacks, "nft is not installed", installCure},
		finding{"iptables-nft", lacks, "not installed", installCure},
		finding{"etcd", lacks, "", "make build"}))
	want := "the default run is not possible here for want of nftables, iptables-nft, etcd: plimsoll doctor --install; make build"
	if err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
}

func TestExamineWithoutRootSaysWhatItCannotTell(t *testing.T) {
	findings := examine(t.Context(), fakeBinaries(t, "kube-apiserver", "kube-proxy", "etcd"), false)
	for _, m := range dataplane.Modes {
		if f := find(t, findings, "mode "+m.Name()); f.state != unknown {
			t.Errorf("without root mode %s is %q", m.Name(), f.state)
		}
	}
	if err := verdict(findings); err == nil || !strings.Contains(err.Error(), "as root") {
		t.Errorf("verdict is %v, want one that asks for root", err)
	}
}

func TestExamineBinaries(t *testing.T) {
	findings := examineBinaries(t.Context(), fakeBinaries(t, "kube-proxy", "etcd"))
	if f := find(t, findings, "kube-proxy"); f.state != has || f.detail != "kube-proxy version --version" {
		t.Errorf("kube-proxy: %+v", f)
	}
	if f := find(t, findings, "kube-apiserver"); f.state != lacks || f.cure != "make build" {
		t.Errorf("a binary that is not there: %+v", f)
	}
}

func TestMissingCapabilities(t *testing.T) {
	for _, c := range []struct {
		status string
		want   []string
	}{
		{"Name:\tx\nCapEff:\t000001ffffffffff\nCapBnd:\t0\n", nil},
		{"CapEff:\t000001fffeffffff\n", nil},                                        // root without CAP_SYS_RESOURCE
		{"CapEff:\t00000000a80425fb\n", []string{"CAP_NET_ADMIN", "CAP_SYS_ADMIN"}}, // root in a container by its defaults
		{"CapEff:\t0000000000000000\n", []string{"CAP_KILL", "CAP_NET_ADMIN", "CAP_SYS_ADMIN"}},
	} {
		if got := missingCapabilities(c.status); !slices.Equal(got, c.want) {
			t.Errorf("%q: %v, want %v", c.status, got, c.want)
		}
	}
}

func TestCPUGovernors(t *testing.T) {
	sysfs := t.TempDir()
	if got := cpuGovernors(sysfs); got != nil {
		t.Errorf("no processor has a governor, got %q", got)
	}
	for cpu, governor := range map[string]string{"cpu0": "schedutil", "cpu1": "performance", "cpu10": "schedutil"} {
		dir := filepath.Join(sysfs, cpu, "cpufreq")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "scaling_governor"), []byte(governor+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if got := cpuGovernors(sysfs); !slices.Equal(got, []string{"performance", "schedutil"}) {
		t.Errorf("governors %q", got)
	}
}

func TestModuleNames(t *testing.T) {
	got := moduleNames("ip_tables 32768 1 iptable_nat, Live 0x0\nnf_nat 57344 2 - Live 0x0\n")
	if !slices.Equal(got, []string{"ip_tables", "nf_nat"}) {
		t.Errorf("modules %q", got)
	}
}

func TestDoctorChangesNothingOfTheHosts(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("trying the kernel needs root")
	}
	temp := t.TempDir()
	t.Setenv("TMPDIR", temp)
	host := func() string {
		var all strings.Builder
		for _, path := range []string{"/proc/self/mountinfo", "/proc/net/dev_snmp6", "/proc/net/ip_tables_names", "/sys/class/net"} {
			entries, _ := os.ReadDir(path)
			text, _ := os.ReadFile(path)
			all.Write(text)
			for _, e := range entries {
				all.WriteString(e.Name() + "\n")
			}
		}
		return all.String()
	}
	before := host()
	var out strings.Builder
	cmd := newDoctorCommand()
	cmd.SetArgs(nil)
	cmd.SetOut(&out)
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	err := cmd.ExecuteContext(t.Context())

	// The test's own folder holds no Kubernetes.
	if err == nil || !strings.Contains(err.Error(), "kube-apiserver") || !strings.Contains(err.Error(), "make build") {
		t.Errorf("error is %v, want one that asks for make build", err)
	}
	for _, m := range dataplane.Modes {
		if !strings.Contains(out.String(), " mode "+m.Name()+" ") {
			t.Errorf("no line for mode %s in\n%s", m.Name(), out.String())
		}
	}
	if after := host(); after != before {
		t.Errorf("the host changed from\n%s\nto\n%s", before, after)
	}
	if left, err := os.ReadDir(temp); err != nil || len(left) > 0 {
		t.Errorf("left behind %v, %v", left, err)
	}
}
