// SPDX-License-Identifier: Apache-2.0

package kind

import (
	"bytes"
	"errors"
	"io"
	"maps"
	"os"
	osexec "os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/kind/pkg/apis/config/v1alpha4"
	"sigs.k8s.io/kind/pkg/exec"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/clusters/host"
	"github.com/plimsoll-bench/plimsoll/clusters/kind/engine"
)

var period = 10 * time.Millisecond

var specs = []clusters.ProxySpec{
	{Name: "iptables", KubeProxy: "iptables", IPTables: "nft", MinSyncPeriod: &period},
	{Name: "direct"},
	{Name: "ebpf", Agent: true, MinSyncPeriod: &period},
	{Name: "direct-conntrack", ConntrackHooks: true},
}

func testWorld() *world {
	return &world{plan: clusters.Plan{Name: "t", Sites: specs}, image: OwnImage + ":v1", pods: "localhost/plimsoll:t"}
}

func TestSitesWithoutAProxyShareACluster(t *testing.T) {
	var got []string
	w := testWorld()
	for _, group := range w.groups() {
		var names []string
		for _, s := range group {
			names = append(names, s.Name)
		}
		got = append(got, w.clusterName(group)+": "+strings.Join(names, " "))
	}
	want := []string{"plimsoll-t-direct: direct direct-conntrack", "plimsoll-t-iptables: iptables", "plimsoll-t-ebpf: ebpf"}
	if !slices.Equal(got, want) {
		t.Errorf("clusters are %q, want %q", got, want)
	}
}

func TestConfigOfAMode(t *testing.T) {
	w := testWorld()
	for _, test := range []struct {
		group   []clusters.ProxySpec
		mode    string
		workers int
		period  bool
	}{
		{specs[:1], "iptables", 1, true},
		{[]clusters.ProxySpec{specs[1], specs[3]}, "none", 2, false},
		{specs[2:3], "none", 1, false},
	} {
		config, err := w.config("c", test.group)
		if err != nil {
			t.Fatal(err)
		}
		if string(config.Networking.KubeProxyMode) != test.mode {
			t.Errorf("%s: kube-proxy's mode is %q, want %q", test.group[0].Name, config.Networking.KubeProxyMode, test.mode)
		}
		if len(config.Nodes) != test.workers+1 {
			t.Errorf("%s: %d nodes, want a control plane and %d workers", test.group[0].Name, len(config.Nodes), test.workers)
		}
		patches := strings.Join(config.KubeadmConfigPatches, "")
		if strings.Contains(patches, "minSyncPeriod: 10ms") != test.period {
			t.Errorf("%s: patches are %s", test.group[0].Name, patches)
		}
	}
}

// A cluster's addresses are of the families that were asked for, and so is the network of its nodes; its workers are spread over zones.
func TestConfigOfFamilies(t *testing.T) {
	for _, test := range []struct {
		family         clusters.IPFamily
		pods, services string
		six            bool
	}{
		{"", "10.244.0.0/16", "10.96.0.0/16", false},
		{clusters.IPv6, "fd00:10:244::/56", "fd00:10:96::/112", true},
		{clusters.DualStack, "10.244.0.0/16,fd00:10:244::/56", "10.96.0.0/16,fd00:10:96::/112", true},
	} {
		w := testWorld()
		w.plan.IPFamily, w.plan.Workers, w.plan.Zones = test.family, 4, 2
		config, err := w.config("c", specs[:1])
		if err != nil {
			t.Fatal(err)
		}
		if n := config.Networking; n.PodSubnet != test.pods || n.ServiceSubnet != test.services {
			t.Errorf("%q: pods have %s and Services %s, want %s and %s", test.family, n.PodSubnet, n.ServiceSubnet, test.pods, test.services)
		}
		if six := slices.Contains(w.networkFlags(), "--ipv6"); six != test.six {
			t.Errorf("%q: the nodes' network speaks IPv6: %v", test.family, six)
		}
		zones := map[string]int{}
		for _, n := range config.Nodes {
			if n.Role == v1alpha4.WorkerRole {
				zones[n.Labels[corev1.LabelTopologyZone]]++
			}
		}
		if want := map[string]int{"zone-0": 2, "zone-1": 2}; !maps.Equal(zones, want) {
			t.Errorf("%q: workers are in zones %v, want %v", test.family, zones, want)
		}
	}
}

// What the templates make are objects that the API server would read.
func TestManifestsAreObjects(t *testing.T) {
	w := testWorld()
	c := &cluster{world: w, name: "c"}
	for _, spec := range specs {
		s := &site{cluster: c, spec: spec, node: &node{name: "c-worker", pid: os.Getpid()}}
		text, err := s.manifests()
		if errors.Is(err, clusters.ErrNotSupported) {
			t.Skip(err)
		}
		if err != nil {
			t.Fatal(err)
		}
		kinds := map[string]int{}
		decoder := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(text), 4096)
		for {
			var object unstructured.Unstructured
			if err := decoder.Decode(&object.Object); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatalf("%s: %v\n%s", spec.Name, err, text)
			}
			if object.Object == nil {
				continue // comments alone
			}
			if object.GetName() == "" || object.GetAPIVersion() == "" {
				t.Errorf("%s: an object without a name or a version: %v", spec.Name, object.Object)
			}
			kinds[object.GetKind()]++
		}
		if kinds["Pod"] != 3 || (kinds["DaemonSet"] == 1) != spec.Agent {
			t.Errorf("%s: objects are %v", spec.Name, kinds)
		}
	}
}

func TestSupportsSaysWhatKindCannot(t *testing.T) {
	if err := (Provider{}).Supports(clusters.ProxySpec{KubeProxy: "iptables", IPTables: "legacy"}); !errors.Is(err, clusters.ErrNotSupported) {
		t.Errorf("the legacy backend: %v", err)
	}
	for _, s := range specs {
		if err := (Provider{}).Supports(s); err != nil {
			t.Errorf("%s: %v", s.Name, err)
		}
	}
}

func TestEnoughSaysWhatIsWanting(t *testing.T) {
	e := engine.Engine{Kind: "docker", Path: t.TempDir()}
	keepsAt := func(dir string) {
		t.Helper()
		script := "#!/bin/sh\n[ \"$*\" = 'info --format {{.DockerRootDir}}' ] && echo '" + dir + "'\n"
		if err := os.WriteFile(filepath.Join(e.Path, e.Kind), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	keepsAt(e.Path)
	if err := Enough(t.Context(), e, 1, 0); err != nil {
		t.Skipf("this host is too small for one node: %v", err)
	}
	err := Enough(t.Context(), e, 1_000_000, 0)
	if err == nil || !strings.Contains(err.Error(), "name fewer --modes") || strings.Contains(err.Error(), "\n") {
		t.Errorf("a million nodes: %v", err)
	}
	// A file system that is always full.
	keepsAt("/proc")
	if err := Enough(t.Context(), e, 1, 0); err == nil || !strings.Contains(err.Error(), "are free in /proc") {
		t.Errorf("no disk where the engine keeps containers: %v", err)
	}
}

func TestExplainSaysWhatToDoAboutAnEngineWithoutRights(t *testing.T) {
	docker := &exec.RunError{
		Command: []string{"docker", "run", "--name", "c-control-plane", "--privileged", "image"},
		Output:  []byte("docker: Error response from daemon: unable to apply caps: operation not permitted.\n\nRun 'docker run --help' for more information\n"),
		Inner:   errors.New("exit status 126"),
	}
	kubeadm := &exec.RunError{Command: []string{"docker", "exec", "c-control-plane", "kubeadm", "init"}, Output: []byte("[init] …\nerror: timed out\n"), Inner: errors.New("exit status 1")}
	for _, test := range []struct {
		err       error
		has, lack string
	}{
		{docker, "--provider lab (docker: docker: Error response from daemon: unable to apply caps: operation not permitted.)", "--privileged"},
		{kubeadm, "failed with error: exit status 1: error: timed out", "--provider lab"},
		{errors.New("node(s) already exist"), "node(s) already exist", "--provider lab"},
	} {
		got := explain(test.err).Error()
		if !strings.Contains(got, test.has) || strings.Contains(got, test.lack) || strings.Contains(got, "\n") {
			t.Errorf("%v is explained as %q", test.err, got)
		}
	}
}

func TestMakingKnowsWhatAnEngineIsAskedFor(t *testing.T) {
	things := host.Containers{Clusters: []string{"plimsoll-t-ebpf"}, Images: []string{"localhost/plimsoll:t"}, Networks: []string{"plimsoll-t"}}
	for _, test := range []struct {
		line string
		want bool
	}{
		{"podman run --name plimsoll-t-ebpf-worker --privileged image", true},
		{"/bin/sh /run/plimsoll/engine/podman run --name plimsoll-t-ebpf-worker image", true},
		{"/usr/bin/docker build --tag localhost/plimsoll:t /dev/shm/x", true},
		{"podman network create --driver bridge plimsoll-t", true},
		{"podman exec plimsoll-t-ebpf-control-plane kubeadm init", false},
		{"podman run --name other image", false},
		{"/usr/bin/conmon --name plimsoll-t-ebpf-worker run", false},
		{"vi docker", false},
	} {
		if got := making(strings.Fields(test.line), things); got != test.want {
			t.Errorf("%s: %v, want %v", test.line, got, test.want)
		}
	}
}

// Pods are not told to ask a resolver that only the node reaches, and those in its own network find the API server all the same.
func TestKubeletNames(t *testing.T) {
	script, err := filepath.Abs("nodeimage/root/usr/local/lib/plimsoll/kubelet-names")
	if err != nil {
		t.Fatal(err)
	}
	const join = "clusters:\n- cluster:\n    server: https://localhost:6443\n"
	for _, test := range []struct {
		name, resolver, server string
		hosts, then            string
		pods                   string // regular expression of what they are told
	}{
		{"podman", "search dns.podman\nnameserver 10.89.0.1\n", join, "10.89.0.3 w\n", "10.89.0.3 w\n", `^search dns\.podman\nnameserver 10\.89\.0\.1\n$`},
		{"Docker", "# by Docker\nnameserver 127.0.0.11\nsearch example.org\noptions ndots:0\n", join, "127.0.0.1 localhost", "127.0.0.1 localhost\n",
			`^# by Docker\nnameserver [0-9.]{7,}\noptions ndots:0\n$`},
		{"no API server yet", "nameserver ::1\nnameserver 10.0.0.1\n", "", "10.0.0.3 w\n", "10.0.0.3 w\n", `^nameserver [0-9.]{7,}\nnameserver 10\.0\.0\.1\n$`},
		{"an API server's address", "nameserver 127.0.0.11\n", strings.Replace(join, "localhost", "[fd00::1]", 1), "", "\n", `^nameserver [0-9.]{7,}\n$`},
		{"after a restart", "nameserver 127.0.0.11\n", "", "10.0.0.3 w\n10.0.0.9 c # by kubelet-names\n", "10.0.0.3 w\n", `^nameserver [0-9.]{7,}\n$`},
	} {
		t.Run(test.name, func(t *testing.T) {
			root := t.TempDir()
			for file, content := range map[string]string{"etc/resolv.conf": test.resolver, "etc/hosts": test.hosts, "etc/kubernetes/bootstrap-kubelet.conf": test.server, "kind/resolv.conf": ""} {
				file = filepath.Join(root, file)
				if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(content), 0o644)); err != nil {
					t.Fatal(err)
				}
			}
			if out, err := osexec.Command("bash", script, root).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			pods, err := os.ReadFile(filepath.Join(root, "kind/resolv.conf"))
			if err != nil || !regexp.MustCompile(test.pods).Match(pods) || strings.Contains(string(pods), "127.") {
				t.Errorf("pods are told (%v):\n%s", err, pods)
			}
			if hosts, err := os.ReadFile(filepath.Join(root, "etc/hosts")); err != nil || string(hosts) != test.then {
				t.Errorf("the node's hosts are (%v):\n%s\nwant:\n%s", err, hosts, test.then)
			}
		})
	}
}
