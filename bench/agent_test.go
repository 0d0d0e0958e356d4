// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/clusters/lab"
	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
	"github.com/plimsoll-bench/plimsoll/dataplane/lb/lbtest"
	"github.com/plimsoll-bench/plimsoll/scenarios"
	"github.com/plimsoll-bench/plimsoll/scenarios/load"
)

const (
	agentNode    = "here"
	agentHealth  = "127.0.0.1:10356"
	agentMetrics = "127.0.0.1:10349"
	apiServer    = "127.0.0.1:6443"
	backend      = "198.18.64.1:8080" // not on loopback, which the API server takes for no endpoint
)

// The real program in front of a real API server: healthy, it carries Services, and nothing is left when it ends.
func TestAgentCarriesServicesUntilItEnds(t *testing.T) {
	bin := needsLab(t)
	before := leftovers(t, nil)
	t.Cleanup(func() {
		if left := leftovers(t, before); len(left) > 0 {
			t.Errorf("left on the host: %v", left)
		}
	})
	cgroup := lbtest.NewCgroup(t)
	needsConnectHook(t)
	ns := mustNetNS(t)
	client, kubeconfig := mustAPI(t, bin, ns)
	serve(t, ns, backend, func(conn net.Conn) { fmt.Fprintln(conn, "backend") })
	pod := mustClientPod(t, ns, cgroup)
	if _, err := client.CoreV1().Nodes().Create(t.Context(), &v1.Node{ObjectMeta: metav1.ObjectMeta{Name: agentNode}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}

	agent := startProgram(t, ns, "agent", "--kubeconfig", kubeconfig, "--cgroup", cgroup, "--hostname-override", agentNode,
		"--healthz-bind-address", agentHealth, "--metrics-bind-address", agentMetrics)
	eventually(t, "healthz of the agent to answer 200", func() error { return get(t, ns, agentHealth, "/healthz", "") })
	if err := get(t, ns, agentMetrics, "/proxyMode", "ebpf"); err != nil {
		t.Error(err)
	}

	address := mustService(t, client, "web")
	ask := func() error {
		reply, err := pod.Do(t.Context(), load.Request{Kind: load.Identify, Addresses: []netip.AddrPort{address}, Count: 3})
		if err != nil {
			t.Fatal(err)
		}
		if reply.Answered["backend"] != 3 {
			return fmt.Errorf("answered %v, failed %v", reply.Answered, reply.Errors)
		}
		return nil
	}
	eventually(t, "the Service's backend to answer", ask)
	if n := len(lbtest.Attached(t, cgroup)); n != 1 {
		t.Errorf("%d programs are attached to the cgroup of an agent at work, want 1", n)
	}
	// The cgroup makes the difference: this process, outside it, has no way to the Service.
	if conn, err := ns.DialContext(t.Context(), "tcp", address.String()); !errors.Is(err, syscall.ENETUNREACH) {
		t.Errorf("a connect from outside the cgroup gave %v and %v, want %v", conn, err, syscall.ENETUNREACH)
	}

	// Writing to a connection that the API server has closed raises this, and is no reason to end.
	if err := agent.Process.Signal(syscall.SIGPIPE); err != nil {
		t.Fatal(err)
	}
	address = mustService(t, client, "shop")
	eventually(t, "the backend of a Service that is made after SIGPIPE to answer", ask)
	if err := get(t, ns, agentHealth, "/healthz", ""); err != nil {
		t.Errorf("the agent after SIGPIPE: %v", err)
	}

	if err := agent.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := agent.Wait(); err != nil {
		t.Errorf("the agent that was asked to end: %v", err)
	}
	if n := len(lbtest.Attached(t, cgroup)); n != 0 {
		t.Errorf("%d programs are attached after the agent's end", n)
	}
	if err := ask(); err == nil || !strings.Contains(err.Error(), "ENETUNREACH:3") {
		t.Errorf("a connect after the agent's end: %v", err)
	}
	// lbtest removes the cgroup itself, which fails if the agent left a folder below it.
}

func TestAgentFlagsSayWhatToDo(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	mount, err := clusters.Cgroup2Mount()
	if err != nil {
		t.Skip(err)
	}
	t.Setenv("KUBERNETES_SERVICE_HOST", "") // this is no pod
	kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
	nobody := "apiVersion: v1\nkind: Config\nclusters: [{name: c, cluster: {server: 'https://127.0.0.1:1'}}]\ncontexts: [{name: c, context: {cluster: c}}]\ncurrent-context: c\n"
	if err := os.WriteFile(kubeconfig, []byte(nobody), 0o600); err != nil {
		t.Fatal(err)
	}
	const cgroup = "CGROUP" // stands for a new one
	good := []string{"--kubeconfig", kubeconfig, "--cgroup", cgroup, "--healthz-bind-address", "", "--metrics-bind-address", ""}
	for _, test := range []struct {
		name         string
		args         []string
		want         string
		root, kernel bool // needs the root of the cgroup hierarchy in sight, a kernel for connect4
	}{
		{"no cgroup", []string{"--kubeconfig", kubeconfig}, "name the processes that shall see Services: --cgroup=" + mount + "/FOLDER", true, false},
		{"the root cgroup", []string{"--kubeconfig", kubeconfig, "--cgroup", mount}, lb.ErrRootCgroup.Error(), true, true},
		{"no such cgroup", append(good, "--cgroup", "/nonexistent"), "attach the socket hooks to /nonexistent: no such file", false, true},
		{"no cgroup2 folder", append(good, "--cgroup", filepath.Dir(kubeconfig)), "not a folder of a cgroup2 file system", false, true},
		{"no kubeconfig", []string{"--cgroup", cgroup}, "name a kubeconfig file", false, false},
		{"no such kubeconfig", append(good, "--kubeconfig", "/nonexistent"), "client configuration: stat /nonexistent: no such file", false, false},
		{"a kubeconfig that is none", append(good, "--kubeconfig", "/proc/self/status"), "client configuration: ", false, false},
		{"healthz without a port", append(good, "--healthz-bind-address", "127.0.0.1"), "serve healthz: listen tcp: address 127.0.0.1: missing port", false, true},
		{"metrics on an address of nobody", append(good, "--metrics-bind-address", "198.18.0.1:1"), "serve metrics: listen tcp 198.18.0.1:1: ", false, true},
		{"capacity", append(good, "--services-capacity", "-1"), "services capacity -1: want 1 to", false, false},
		{"period", append(good, "--min-sync-period", "-1s"), "minimum sync period -1s is negative", false, false},
		{"conntrack", append(good, "--conntrack-tcp-timeout-close-wait", "10ms"), "10ms is none of conntrack's periods", false, false},
		{"a period without a unit", append(good, "--min-sync-period", "10"), "--min-sync-period", false, false},
		{"no such flag", append(good, "--proxy-mode", "ebpf"), "unknown flag: --proxy-mode (plimsoll agent --help lists the flags)", false, false},
		{"an argument", append(good, "now"), `unknown command "now"`, false, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			if _, err := os.Stat(filepath.Join(mount, "cgroup.type")); test.root && err == nil {
				t.Skip("in a container the root of the cgroup hierarchy is out of sight")
			}
			if test.kernel {
				needsConnectHook(t)
			}
			args := append([]string{"agent"}, test.args...)
			if i := slices.Index(args, cgroup); i >= 0 {
				args[i] = lbtest.NewCgroup(t)
			}
			// An agent that takes its flags for good ones ends all the same, and with no error.
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			err := run(ctx, &bytes.Buffer{}, &bytes.Buffer{}, args)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("the error is %v, want one that says %q", err, test.want)
			}
			if err != nil && strings.Contains(err.Error(), "\n") {
				t.Errorf("the error has more than one line: %v", err)
			}
		})
	}
}

// needsConnectHook skips where the kernel cannot load the load balancer.
func needsConnectHook(t testing.TB) {
	t.Helper()
	b, err := lb.Load(lb.Options{Services: 1, Backends: 1})
	if errors.Is(err, lb.ErrNotSupported) {
		t.Skipf("skipped: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}

// mustNetNS makes a node: a network namespace with the backend's address and no way out.
func mustNetNS(t testing.TB) *clusters.NetNS {
	t.Helper()
	ns, err := clusters.NewNetNS()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := ns.Close(); err != nil {
			t.Error(err)
		}
	})
	h, err := ns.Netlink()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	address, err := netlink.ParseAddr(netip.MustParseAddrPort(backend).Addr().String() + "/32")
	if err != nil {
		t.Fatal(err)
	}
	if err := h.AddrAdd(lo, address); err != nil {
		t.Fatal(err)
	}
	return ns
}

// mustAPI starts an API server and returns a client for this process, and a kubeconfig for programs in ns.
func mustAPI(t testing.TB, bin string, ns *clusters.NetNS) (kubernetes.Interface, string) {
	t.Helper()
	control, kubeconfig := mustControlPlane(t, bin)
	mustForward(t, control, ns)
	client, err := kubernetes.NewForConfig(control.RESTConfig())
	if err != nil {
		t.Fatal(err)
	}
	return client, kubeconfig
}

// mustControlPlane starts an API server and returns a kubeconfig for programs in namespaces that mustForward gives a way there.
func mustControlPlane(t testing.TB, bin string) (*lab.ControlPlane, string) {
	t.Helper()
	dir := t.TempDir()
	control, err := lab.StartControlPlane(t.Context(), lab.ControlPlaneOptions{Name: fmt.Sprintf("test-agent-%d", os.Getpid()), Dir: dir, Bin: bin})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := control.Close(ctx); err != nil {
			t.Error(err)
		}
	})
	kubeconfig := filepath.Join(dir, "kubeconfig")
	if err := control.Kubeconfig(kubeconfig, apiServer); err != nil {
		t.Fatal(err)
	}
	return control, kubeconfig
}

// mustForward gives programs in ns a way to the API server until the test ends.
func mustForward(t testing.TB, control *lab.ControlPlane, ns *clusters.NetNS) {
	t.Helper()
	l, err := ns.Listen(t.Context(), apiServer)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go control.Forward(l)
}

// mustService creates a Service with the backend for its endpoint and returns the address that the API server gave it.
func mustService(t testing.TB, client kubernetes.Interface, service string) netip.AddrPort {
	t.Helper()
	created, err := client.CoreV1().Services("default").Create(t.Context(), &v1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: service}, Spec: v1.ServiceSpec{Ports: []v1.ServicePort{{Port: 80}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	endpoint := netip.MustParseAddrPort(backend)
	name, port, ready := "", int32(endpoint.Port()), true
	_, err = client.DiscoveryV1().EndpointSlices("default").Create(t.Context(), &discovery.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: service + "-1", Labels: map[string]string{discovery.LabelServiceName: service}},
		AddressType: discovery.AddressTypeIPv4,
		Ports:       []discovery.EndpointPort{{Name: &name, Port: &port}},
		Endpoints:   []discovery.Endpoint{{Addresses: []string{endpoint.Addr().String()}, Conditions: discovery.EndpointConditions{Ready: &ready}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return netip.AddrPortFrom(netip.MustParseAddr(created.Spec.ClusterIP), 80)
}

// serve handles every connection to address in ns until the test ends.
func serve(t testing.TB, ns *clusters.NetNS, address string, handle func(net.Conn)) {
	t.Helper()
	l, err := ns.Listen(t.Context(), address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				handle(conn)
			}()
		}
	}()
}

// startProgram starts plimsoll in ns and kills it after the test unless it has ended. A failed test prints what it said.
func startProgram(t testing.TB, ns *clusters.NetNS, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	cmd := exec.Command(self, args...)
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := ns.Do(cmd.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			cmd.Process.Kill()
			cmd.Wait()
		}
		if t.Failed() {
			t.Logf("plimsoll %s:\n%s", args[0], said.String())
		}
	})
	return cmd
}

// mustClientPod starts the client of a pod, in ns and in cgroup.
func mustClientPod(t testing.TB, ns *clusters.NetNS, cgroup string) *load.Driver {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	folder, err := os.Open(cgroup)
	if err != nil {
		t.Fatal(err)
	}
	defer folder.Close()
	cmd := exec.Command(self, scenarios.ClientCommand)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(folder.Fd())}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := ns.Do(cmd.Start); err != nil {
		t.Fatal(err)
	}
	driver := load.NewDriver(stdin, stdout)
	t.Cleanup(func() {
		if err := driver.Close(); err != nil {
			t.Error(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("client pod: %v", err)
		}
	})
	return driver
}

// get asks a server in ns for a page and returns an error unless it answers 200 with text in it.
func get(t testing.TB, ns *clusters.NetNS, address, path, text string) error {
	t.Helper()
	transport := &http.Transport{DialContext: ns.DialContext, DisableKeepAlives: true}
	answer, err := (&http.Client{Transport: transport, Timeout: 5 * time.Second}).Get("http://" + address + path)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	page, err := io.ReadAll(answer.Body)
	if err != nil {
		return err
	}
	if answer.StatusCode != http.StatusOK || !strings.Contains(string(page), text) {
		return fmt.Errorf("%s: %s, %s; want 200 and %q", path, answer.Status, page, text)
	}
	return nil
}

// eventually asks for a condition until it holds, which a busy machine may take a while for.
func eventually(t testing.TB, what string, condition func() error) {
	t.Helper()
	tick, late := time.NewTicker(10*time.Millisecond), time.After(30*time.Second)
	defer tick.Stop()
	for {
		err := condition()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("waited for %s: %v", what, err)
		}
	}
}
