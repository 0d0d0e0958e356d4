// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"errors"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/plimsoll-bench/plimsoll/clusters"
)

// Every mode must keep what the list's users rely on.
func TestModesKeepTheContract(t *testing.T) {
	seen := map[string]bool{}
	for _, m := range Modes {
		name := m.Name()
		if name == "" || name != strings.ToLower(name) || strings.ContainsAny(name, " /=,_") {
			t.Errorf("mode %q: want a lower-case word that fits a record's key", name)
		}
		if seen[name] {
			t.Errorf("mode %s stands in the list twice", name)
		}
		seen[name] = true
		if m.Doc() == "" || strings.Contains(m.Doc(), "\n") {
			t.Errorf("mode %s: its doc must be one line", name)
		}
		if found, err := Find(name); err != nil || found != m {
			t.Errorf("Find(%s): %v, %v", name, found, err)
		}
		if floor := m.Floor(); floor != "" {
			if f, err := Find(floor); err != nil || f.Floor() != "" {
				t.Errorf("mode %s is held against %q, which is no floor: %v", name, floor, err)
			}
		}
		for _, s := range []Settings{{}, {ProxyDefaults: true}} {
			spec := m.Spec(s)
			if spec.Name != name {
				t.Errorf("mode %s names its site %q", name, spec.Name)
			}
			proxy := spec.KubeProxy != "" || spec.Agent
			if proxy != (m.Floor() != "") {
				t.Errorf("mode %s: floors have no proxy, all others have one", name)
			}
			if proxy && (spec.MinSyncPeriod == nil) != s.ProxyDefaults {
				t.Errorf("mode %s, %+v: minSyncPeriod is %v", name, s, spec.MinSyncPeriod)
			}
		}
	}
}

func TestFindNamesWhatThereIs(t *testing.T) {
	_, err := Find("iptable")
	if err == nil || !strings.Contains(err.Error(), "iptables-legacy") {
		t.Errorf("the error does not help: %v", err)
	}
}

func TestSupportedSaysWhy(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	for _, m := range Modes {
		err := m.Supported(t.Context())
		t.Logf("%s: %v", m.Name(), err)
		if err != nil && !errors.Is(err, clusters.ErrNotSupported) {
			t.Errorf("mode %s: %v does not wrap ErrNotSupported", m.Name(), err)
		}
	}
}

func TestKubeServicesInOrder(t *testing.T) {
	rules := []string{
		"-N KUBE-SERVICES",
		`-A KUBE-SERVICES -d 198.19.3.4/32 -p tcp -m comment --comment "plimsoll/s-1 cluster IP" -m tcp --dport 80 -j KUBE-SVC-AAAA`,
		`-A KUBE-SERVICES -d 198.19.0.1/32 -p tcp -m comment --comment "default/kubernetes:https cluster IP" -m tcp --dport 443 -j KUBE-SVC-NPX46M4PTMTKRN6Y`,
		`-A KUBE-SERVICES -d 198.19.9.9/32 -p tcp -m comment --comment "a/local cluster IP" -m tcp --dport 81 -j KUBE-SVL-BBBB`,
		`-A KUBE-SERVICES -d 198.19.7.7/32 -p tcp -m comment --comment "a/external IP" -m tcp --dport 80 -j KUBE-EXT-CCCC`,
		`-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS`,
	}
	want := []netip.AddrPort{
		netip.MustParseAddrPort("198.19.3.4:80"), netip.MustParseAddrPort("198.19.0.1:443"), netip.MustParseAddrPort("198.19.9.9:81"),
	}
	if got := parseKubeServices(rules); !slices.Equal(got, want) {
		t.Errorf("chain is %v, want %v", got, want)
	}
}

func FuzzKubeServices(f *testing.F) {
	f.Add("-A KUBE-SERVICES -d 198.19.3.4/32 -p tcp --dport 80 -j KUBE-SVC-AAAA")
	f.Add("-d\n-j -j --dport")
	f.Fuzz(func(t *testing.T, text string) {
		lines := strings.Split(text, "\n")
		if got := parseKubeServices(lines); len(got) > len(lines) {
			t.Errorf("%d Services out of %d rules", len(got), len(lines))
		}
	})
}
