// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"

	"github.com/plimsoll-bench/plimsoll/dataplane/agent"
	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
	"github.com/plimsoll-bench/plimsoll/dataplane/lb/lbtest"
)

func TestMain(m *testing.M) { lbtest.Main(m) }

const (
	thisNode    = "here"
	otherNode   = "there"
	clusterIP   = "10.96.0.10"
	nodeAddress = "10.0.0.1"

	// one and two are the addresses of backends that listen, at each port of a port.
	one = "127.0.0.1"
	two = "127.0.0.2"
)

// A rig is an agent that runs against an API of its own, and a pod that sees its Services.
type rig struct {
	*testing.T
	pod    *lbtest.Pod
	client *fake.Clientset
	health string // where healthz is served
	metric string // where metrics are served

	patience time.Duration // how long a condition is waited for; 0: 5 s
}

// startRig runs an agent over objects until the test ends.
func startRig(t *testing.T, options lb.Options, objects ...runtime.Object) *rig {
	t.Helper()
	r := newRig(t, objects...)
	r.start(options)
	return r
}

// newRig is one without an agent yet.
func newRig(t *testing.T, objects ...runtime.Object) *rig {
	t.Helper()
	pod := lbtest.StartPod(t)
	for _, address := range []string{one, two} {
		for _, port := range []string{"8080", "9090"} {
			for _, network := range []string{"tcp", "udp"} {
				pod.Listen(t, network, net.JoinHostPort(address, port))
			}
		}
	}
	client := fake.NewClientset(append(objects, node(thisNode))...)
	return &rig{T: t, pod: pod, client: client, health: freeAddress(t), metric: freeAddress(t)}
}

// start runs the agent. It skips the test where the kernel cannot.
func (r *rig) start(options lb.Options) {
	r.Helper()
	r.run(agent.Config{Cgroup: r.pod.Cgroup, LB: options})
}

// run runs an agent that is so, until the test ends or end is called.
func (r *rig) run(cfg agent.Config) (end func()) {
	r.Helper()
	options := cfg.LB
	if options.PinDir = ""; len(cfg.Devices) > 0 {
		options.Packets = &lb.PacketOptions{}
	}
	if err := mustLoad(r.T, options).Close(); err != nil {
		r.Fatal(err)
	}
	if cfg.Client == nil {
		cfg.Client = r.client
	}
	cfg.NodeName, cfg.HealthzBindAddress, cfg.MetricsBindAddress = thisNode, r.health, r.metric
	ctx, cancel := context.WithCancel(r.Context())
	done := make(chan error, 1)
	go func() { done <- agent.Run(ctx, cfg) }()
	end = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			r.Errorf("agent: %v", err)
		}
	})
	r.Cleanup(end)
	return end
}

func mustLoad(t *testing.T, options lb.Options) *lb.Balancer {
	t.Helper()
	b, err := lb.Load(options)
	if errors.Is(err, lb.ErrNotSupported) {
		t.Skipf("skipped: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return b
}

var freeAddresses atomic.Uint32

// freeAddress is an address and port that stay free while nobody listens there. The kernel gives ports of 127.0.0.1 to connects, of whose time
// nobody knows, so the address is another each time.
func freeAddress(t *testing.T) string {
	t.Helper()
	n := freeAddresses.Add(1)
	listener, err := net.Listen("tcp", fmt.Sprintf("127.1.%d.%d:0", n>>8&0xff, n&0xff))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().String()
}

// wants waits until connects to a port are answered by all of backends and no other.
func (r *rig) wants(network, address string, backends ...string) {
	r.Helper()
	var got lbtest.Outcome
	r.eventually(func() bool {
		got = r.pod.Connect(r.T, network, address, 20*len(backends))
		return len(got.Errors) == 0 && slices.Equal(slices.Sorted(maps.Keys(got.Answers)), backends)
	}, func() string {
		return fmt.Sprintf("%s %s: want answers of %v, got %+v", network, address, backends, got)
	})
}

// wantsHealth waits until a Service's health check answers with a status code and so many local endpoints; code 0 is no answer.
func (r *rig) wantsHealth(address string, code, endpoints int) {
	r.Helper()
	var got int
	var text string
	r.eventually(func() bool {
		got, text = r.get(address, "/")
		return got == code && (code == 0 || strings.Contains(text, fmt.Sprintf(`"localEndpoints": %d`, endpoints)))
	}, func() string {
		return fmt.Sprintf("health check: want %d and %d endpoints, got %d: %s", code, endpoints, got, text)
	})
}

// wantsError waits until a connect fails with number.
func (r *rig) wantsError(network, address string, number unix.Errno) {
	r.Helper()
	var got lbtest.Outcome
	r.eventually(func() bool {
		got = r.pod.Connect(r.T, network, address, 1)
		return got.Errors[number.Error()] == 1
	}, func() string { return fmt.Sprintf("%s %s: want %q, got %+v", network, address, number, got) })
}

// healthy waits until the agent says that it is.
func (r *rig) healthy() {
	r.Helper()
	r.eventually(func() bool { code, _ := r.get(r.health, "/healthz"); return code == http.StatusOK }, func() string { return "not healthy" })
}

func (r *rig) eventually(condition func() bool, otherwise func() string) {
	r.Helper()
	tick, late := time.NewTicker(5*time.Millisecond), time.After(cmp.Or(r.patience, 5*time.Second))
	defer tick.Stop()
	for !condition() {
		select {
		case <-tick.C:
		case <-late:
			r.Fatal(otherwise())
		}
	}
}

// get reads a page of the agent and returns its status code and text, or 0 if nobody serves it.
func (r *rig) get(address, path string) (int, string) {
	answer, err := http.Get("http://" + address + path)
	if err != nil {
		return 0, err.Error()
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		r.Fatal(err)
	}
	return answer.StatusCode, string(text)
}

func (r *rig) create(objects ...runtime.Object) {
	r.Helper()
	for _, object := range objects {
		if err := r.client.Tracker().Add(object); err != nil {
			r.Fatal(err)
		}
	}
}

func (r *rig) updateService(service *v1.Service) {
	r.Helper()
	if _, err := r.client.CoreV1().Services(service.Namespace).Update(r.Context(), service, metav1.UpdateOptions{}); err != nil {
		r.Fatal(err)
	}
}

func (r *rig) updateSlice(slice *discovery.EndpointSlice) {
	r.Helper()
	if _, err := r.client.DiscoveryV1().EndpointSlices(slice.Namespace).Update(r.Context(), slice, metav1.UpdateOptions{}); err != nil {
		r.Fatal(err)
	}
}

// node has the addresses that a host of two IP versions with a second network has.
func node(name string) *v1.Node {
	var addresses []v1.NodeAddress
	for _, address := range []string{nodeAddress, "fd00:1::1", "10.1.1.1"} {
		addresses = append(addresses, v1.NodeAddress{Type: v1.NodeInternalIP, Address: address})
	}
	return &v1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: v1.NodeStatus{Addresses: addresses}}
}

// service is a Service at clusterIP; change, if not nil, makes it special.
func service(change func(*v1.Service), ports ...v1.ServicePort) *v1.Service {
	s := &v1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web"},
		Spec:       v1.ServiceSpec{Type: v1.ServiceTypeClusterIP, ClusterIP: clusterIP, ClusterIPs: []string{clusterIP}, Ports: ports},
	}
	if change != nil {
		change(s)
	}
	return s
}

func port(name string, protocol v1.Protocol, number int32) v1.ServicePort {
	return v1.ServicePort{Name: name, Protocol: protocol, Port: number, TargetPort: intstr.FromString(name)}
}

// slice holds endpoints of the Service web, serving port 8080 under portName.
func slice(name, portName string, protocol v1.Protocol, endpoints ...discovery.Endpoint) *discovery.EndpointSlice {
	number := int32(8080)
	return &discovery.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Name: name, Labels: map[string]string{discovery.LabelServiceName: "web"}},
		AddressType: discovery.AddressTypeIPv4,
		Ports:       []discovery.EndpointPort{{Name: &portName, Protocol: &protocol, Port: &number}},
		Endpoints:   endpoints,
	}
}

// endpoint is a ready one.
func endpoint(address, nodeName string) discovery.Endpoint {
	return discovery.Endpoint{Addresses: []string{address}, NodeName: &nodeName}
}

func terminating(e discovery.Endpoint, serving bool) discovery.Endpoint {
	no, yes := false, true
	e.Conditions = discovery.EndpointConditions{Ready: &no, Serving: &serving, Terminating: &yes}
	return e
}

const http80 = clusterIP + ":80"

func TestServicesComeChangeAndGo(t *testing.T) {
	r := startRig(t, lb.Options{},
		service(nil, port("http", v1.ProtocolTCP, 80)), slice("web-1", "http", v1.ProtocolTCP, endpoint(one, thisNode)))
	r.wants("tcp", http80, one+":8080")

	t.Run("endpoints change", func(t *testing.T) {
		r.updateSlice(slice("web-1", "http", v1.ProtocolTCP, endpoint(one, thisNode), endpoint(two, otherNode)))
		r.wants("tcp", http80, one+":8080", two+":8080")
		r.updateSlice(slice("web-1", "http", v1.ProtocolTCP, endpoint(two, otherNode)))
		r.wants("tcp", http80, two+":8080")
	})
	t.Run("no endpoints are refused", func(t *testing.T) {
		r.updateSlice(slice("web-1", "http", v1.ProtocolTCP))
		r.wantsError("tcp", http80, unix.ECONNREFUSED)
	})
	t.Run("terminating endpoints serve when none is ready", func(t *testing.T) {
		r.updateSlice(slice("web-1", "http", v1.ProtocolTCP,
			terminating(endpoint(one, thisNode), true), terminating(endpoint(two, thisNode), false)))
		r.wants("tcp", http80, one+":8080")
		r.updateSlice(slice("web-1", "http", v1.ProtocolTCP, terminating(endpoint(one, thisNode), true), endpoint(two, thisNode)))
		r.wants("tcp", http80, two+":8080")
	})
	t.Run("a Service's port changes", func(t *testing.T) {
		r.updateService(service(nil, port("http", v1.ProtocolTCP, 81)))
		r.wants("tcp", clusterIP+":81", two+":8080")
		r.wantsError("tcp", http80, unix.ENETUNREACH)
	})
	t.Run("a port's name changes and its frontend stays", func(t *testing.T) {
		r.updateSlice(slice("web-1", "web", v1.ProtocolTCP, endpoint(one, thisNode)))
		r.updateService(service(nil, port("web", v1.ProtocolTCP, 81)))
		r.wants("tcp", clusterIP+":81", one+":8080")
	})
	t.Run("a Service is deleted", func(t *testing.T) {
		if err := r.client.CoreV1().Services("default").Delete(r.Context(), "web", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		r.wantsError("tcp", clusterIP+":81", unix.ENETUNREACH)
	})
}

// Each address of a dual-stack Service leads to the endpoints of its own IP version.
func TestDualStack(t *testing.T) {
	const clusterIP6, three = "fd00:96::10", "fd00::3"
	dual := service(func(s *v1.Service) {
		s.Spec.ClusterIPs = append(s.Spec.ClusterIPs, clusterIP6)
		s.Spec.IPFamilies = []v1.IPFamily{v1.IPv4Protocol, v1.IPv6Protocol}
	}, port("http", v1.ProtocolTCP, 80))
	six := slice("web-6", "http", v1.ProtocolTCP, endpoint(three, thisNode))
	six.AddressType = discovery.AddressTypeIPv6
	r := newRig(t, dual, slice("web-4", "http", v1.ProtocolTCP, endpoint(one, thisNode)), six)
	r.pod.AddAddress(t, three+"/128")
	backend6, http6 := net.JoinHostPort(three, "8080"), net.JoinHostPort(clusterIP6, "80")
	r.pod.Listen(t, "tcp", backend6)
	r.start(lb.Options{})
	r.wants("tcp", http80, one+":8080")
	r.wants("tcp", http6, backend6)

	six = six.DeepCopy()
	six.Endpoints = nil
	r.updateSlice(six)
	r.wantsError("tcp", http6, unix.ECONNREFUSED)
	r.wants("tcp", http80, one+":8080")
	r.updateService(service(nil, port("http", v1.ProtocolTCP, 80)))
	r.wantsError("tcp", http6, unix.ENETUNREACH)
	r.wants("tcp", http80, one+":8080")
}

func TestPorts(t *testing.T) {
	both := slice("web-1", "dns", v1.ProtocolUDP, endpoint(one, thisNode))
	name, protocol, number := "dns-tcp", v1.ProtocolTCP, int32(9090)
	both.Ports = append(both.Ports, discovery.EndpointPort{Name: &name, Protocol: &protocol, Port: &number})
	// The same named port, at another number.
	other := slice("web-2", "dns-tcp", v1.ProtocolTCP, endpoint(two, thisNode))
	r := startRig(t, lb.Options{},
		service(nil, port("dns", v1.ProtocolUDP, 53), port("dns-tcp", v1.ProtocolTCP, 53), port("none", v1.ProtocolTCP, 54)), both, other)
	r.wants("udp", clusterIP+":53", one+":8080")
	r.wants("tcp", clusterIP+":53", one+":9090", two+":8080")
	r.wantsError("tcp", clusterIP+":54", unix.ECONNREFUSED)
}

// A connected UDP socket does not stay on an endpoint that is gone: its owner is told, and connects anew.
func TestConnectedUDPLeavesGoneEndpoints(t *testing.T) {
	r := startRig(t, lb.Options{}, service(nil, port("dns", v1.ProtocolUDP, 53)), slice("web-1", "dns", v1.ProtocolUDP, endpoint(one, thisNode)))
	dns := clusterIP + ":53"
	r.wants("udp", dns, one+":8080")
	r.pod.Keep(t, "udp", dns)
	r.updateSlice(slice("web-1", "dns", v1.ProtocolUDP, endpoint(two, thisNode)))
	var got lbtest.Outcome
	r.eventually(func() bool {
		got = r.pod.AskKept(t)
		return got.Errors[unix.EDESTADDRREQ.Error()]+got.Errors[unix.ECONNABORTED.Error()] == 1
	}, func() string { return fmt.Sprintf("want the socket to be ended, got %+v", got) })
	r.wants("udp", dns, two+":8080")
}

func TestLocalPolicy(t *testing.T) {
	local := v1.ServiceInternalTrafficPolicyLocal
	r := startRig(t, lb.Options{},
		service(func(s *v1.Service) { s.Spec.InternalTrafficPolicy = &local }, port("http", v1.ProtocolTCP, 80)),
		slice("web-1", "http", v1.ProtocolTCP, endpoint(one, thisNode), endpoint(two, otherNode)))
	r.wants("tcp", http80, one+":8080")

	// None is local but one exists: not refused, left untranslated.
	r.updateSlice(slice("web-1", "http", v1.ProtocolTCP, endpoint(two, otherNode)))
	r.wantsError("tcp", http80, unix.ENETUNREACH)
	// None exists: refused.
	r.updateSlice(slice("web-1", "http", v1.ProtocolTCP))
	r.wantsError("tcp", http80, unix.ECONNREFUSED)
}

func TestZoneHints(t *testing.T) {
	near, far := endpoint(one, otherNode), endpoint(two, otherNode)
	near.Hints = &discovery.EndpointHints{ForZones: []discovery.ForZone{{Name: "a"}}}
	far.Hints = &discovery.EndpointHints{ForZones: []discovery.ForZone{{Name: "b"}}}
	r := startRig(t, lb.Options{},
		service(nil, port("http", v1.ProtocolTCP, 80)), slice("web-1", "http", v1.ProtocolTCP, near, far))
	r.wants("tcp", http80, one+":8080", two+":8080")

	zoned := node(thisNode)
	zoned.Labels = map[string]string{v1.LabelTopologyZone: "a"}
	if _, err := r.client.CoreV1().Nodes().Update(r.Context(), zoned, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	r.wants("tcp", http80, one+":8080")
}

// What is not for this proxy to carry is not translated.
func TestIgnored(t *testing.T) {
	label := func(key string) func(*v1.Service) {
		return func(s *v1.Service) { s.Labels = map[string]string{key: "another"} }
	}
	headless := slice("web-1", "http", v1.ProtocolTCP, endpoint(one, thisNode))
	headless.Labels[v1.IsHeadlessService] = ""
	plain := slice("web-1", "http", v1.ProtocolTCP, endpoint(one, thisNode))
	for name, test := range map[string]struct {
		service *v1.Service
		slice   *discovery.EndpointSlice
		want    unix.Errno
	}{
		"another proxy's Service": {service(label("service.kubernetes.io/service-proxy-name"), port("http", v1.ProtocolTCP, 80)), plain, unix.ENETUNREACH},
		"ExternalName":            {service(func(s *v1.Service) { s.Spec.Type = v1.ServiceTypeExternalName }, port("http", v1.ProtocolTCP, 80)), plain, unix.ENETUNREACH},
		"a headless slice":        {service(nil, port("http", v1.ProtocolTCP, 80)), headless, unix.ECONNREFUSED},
	} {
		t.Run(name, func(t *testing.T) {
			// The second Service shows that the first one has been seen.
			seen := service(func(s *v1.Service) {
				s.Name, s.Spec.ClusterIP, s.Spec.ClusterIPs = "zzz", "10.96.0.11", []string{"10.96.0.11"}
			}, port("http", v1.ProtocolTCP, 80))
			r := startRig(t, lb.Options{}, test.service, test.slice, seen)
			r.wantsError("tcp", "10.96.0.11:80", unix.ECONNREFUSED)
			r.wantsError("tcp", http80, test.want)
		})
	}
}

func TestStatus(t *testing.T) {
	lines := agent.StartLogs(t)
	r := startRig(t, lb.Options{Services: 1},
		service(nil, port("http", v1.ProtocolTCP, 80)), slice("web-1", "http", v1.ProtocolTCP, endpoint(one, thisNode), endpoint(two, thisNode)))
	r.wants("tcp", http80, one+":8080", two+":8080")

	for _, page := range []struct {
		address, path string
		code          int
		text          string
	}{
		{r.health, "/healthz", 200, `"healthy":true`},
		{r.health, "/livez", 200, `"healthy":true`},
		{r.metric, "/proxyMode", 200, "ebpf"},
		{r.metric, "/metrics", 200, "\nplimsoll_lb_frontends{ip_family=\"IPv4\"} 1\n"},
		{r.metric, "/metrics", 200, "\nplimsoll_lb_backends{ip_family=\"IPv4\"} 2\n"},
		{r.metric, "/metrics", 200, "\nplimsoll_lb_frontends{ip_family=\"IPv6\"} 0\n"},
		{r.metric, "/metrics", 200, "\nplimsoll_lb_map_entries{ip_family=\"IPv4\",map=\"services\"} 1\n"},
		{r.metric, "/metrics", 200, "\nplimsoll_lb_map_capacity{ip_family=\"IPv4\",map=\"services\"} 1\n"},
		{r.metric, "/metrics", 200, "\nplimsoll_lb_sync_errors_total 0\n"},
		{r.metric, "/metrics", 200, "\nkubeproxy_sync_proxy_rules_last_queued_timestamp_seconds{ip_family=\"IPv4\"} "},
		{r.metric, "/metrics", 200, "\nkubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family=\"IPv4\"} "},
		{r.metric, "/metrics", 200, "\nkubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family=\"IPv6\"} "},
		{r.metric, "/metrics", 200, "\nkubeproxy_sync_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"} "},
	} {
		if code, text := r.get(page.address, page.path); code != page.code || !strings.Contains(text, page.text) {
			t.Errorf("%s: want %d and %q, got %d:\n%s", page.path, page.code, page.text, code, text)
		}
	}

	t.Run("a full map harms no other Service and shows", func(t *testing.T) {
		r.create(service(func(s *v1.Service) {
			s.Name, s.Spec.ClusterIP, s.Spec.ClusterIPs = "more", "10.96.0.11", []string{"10.96.0.11"}
		}, port("http", v1.ProtocolTCP, 80)))
		var text string
		r.eventually(func() bool {
			_, text = r.get(r.metric, "/metrics")
			return strings.Contains(text, "\nplimsoll_lb_sync_errors_total 1\n")
		}, func() string { return text })
		r.wants("tcp", http80, one+":8080", two+":8080")
		if text := lines.String(); !strings.Contains(text, `"Service port not programmed" err=`) || !strings.Contains(text, `servicePort="default/more:http"`) {
			t.Errorf("the log does not name the Service: %s", text)
		}
		if _, text := r.get(r.metric, "/status"); !strings.Contains(text, "IPv4: 1 frontends could not be programmed (see the log)") {
			t.Errorf("status does not tell: %s", text)
		}

		// As soon as there is room, the other one has it.
		if err := r.client.CoreV1().Services("default").Delete(r.Context(), "web", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		r.wantsError("tcp", "10.96.0.11:80", unix.ECONNREFUSED)
	})
	t.Run("a node that is deleted is not eligible", func(t *testing.T) {
		if err := r.client.CoreV1().Nodes().Delete(r.Context(), thisNode, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		var text string
		r.eventually(func() bool {
			var code int
			code, text = r.get(r.health, "/healthz")
			return code == 503
		}, func() string { return text })
		if code, text := r.get(r.health, "/livez"); code != 200 {
			t.Errorf("livez: want 200, got %d: %s", code, text)
		}
	})
}

// A new agent carries on with what a former one pinned, and withdraws nothing of it before it has seen the cluster.
func TestRestart(t *testing.T) {
	options := lb.Options{PinDir: lbtest.MountBPF(t)}
	r := newRig(t, service(nil, port("http", v1.ProtocolTCP, 80)), slice("web-1", "http", v1.ProtocolTCP, endpoint(two, thisNode)))
	former := mustLoad(t, options)
	backend := []netip.AddrPort{netip.MustParseAddrPort(one + ":8080")}
	const stale = "10.96.0.99:80"
	err := former.Sync([]lb.Change{
		{Frontend: lb.Frontend{Address: netip.MustParseAddrPort(http80), Protocol: lb.TCP}, Backends: backend},
		{Frontend: lb.Frontend{Address: netip.MustParseAddrPort(stale), Protocol: lb.TCP}, Backends: backend},
	})
	if err := errors.Join(err, former.Close()); err != nil {
		t.Fatal(err)
	}

	listing, answer := make(chan struct{}, 1), make(chan struct{})
	r.client.PrependReactor("list", "endpointslices", func(k8stesting.Action) (bool, runtime.Object, error) {
		select {
		case listing <- struct{}{}:
		default:
		}
		<-answer
		return false, nil, nil
	})
	r.start(options)
	<-listing
	r.eventually(func() bool { code, _ := r.get(r.metric, "/metrics"); return code == 200 }, func() string { return "no metrics" })
	r.wants("tcp", http80, one+":8080")
	r.wants("tcp", stale, one+":8080")

	close(answer)
	r.wants("tcp", http80, two+":8080")
	r.wantsError("tcp", stale, unix.ENETUNREACH)
}

// After a reboot nothing is pinned. Services are then served by the snapshot before the API server answers, and by what it says after.
func TestReboot(t *testing.T) {
	file := filepath.Join(t.TempDir(), "snapshot")
	r := newRig(t, service(nil, port("http", v1.ProtocolTCP, 80)), slice("web-1", "http", v1.ProtocolTCP, endpoint(one, thisNode)))
	end := r.run(agent.Config{Cgroup: r.pod.Cgroup, Snapshot: file})
	r.wants("tcp", http80, one+":8080")
	end()
	r.wantsError("tcp", http80, unix.ENETUNREACH)

	r.updateSlice(slice("web-1", "http", v1.ProtocolTCP, endpoint(two, thisNode)))
	answer := make(chan struct{})
	r.client.PrependReactor("list", "*", func(k8stesting.Action) (bool, runtime.Object, error) {
		<-answer
		return false, nil, nil
	})
	r.run(agent.Config{Cgroup: r.pod.Cgroup, Snapshot: file})
	r.wants("tcp", http80, one+":8080")
	// Load balancers send to this node all the same.
	var health string
	r.eventually(func() bool {
		var code int
		code, health = r.get(r.health, "/healthz")
		return code == http.StatusOK
	}, func() string { return "healthz by a snapshot: " + health })
	close(answer)
	r.wants("tcp", http80, two+":8080")
}

// A second agent on a node says so and ends; the first one goes on.
func TestOneAgentANode(t *testing.T) {
	pins := lbtest.MountBPF(t)
	r := newRig(t, service(nil, port("http", v1.ProtocolTCP, 80)), slice("web-1", "http", v1.ProtocolTCP, endpoint(one, thisNode)))
	r.run(agent.Config{Cgroup: r.pod.Cgroup, LB: lb.Options{PinDir: pins}})
	r.wants("tcp", http80, one+":8080")
	for _, cfg := range []agent.Config{{Cgroup: r.pod.Cgroup}, {Cgroup: lbtest.NewCgroup(t), LB: lb.Options{PinDir: pins}}} {
		cfg.Client, cfg.NodeName = r.client, thisNode
		if err := agent.Run(t.Context(), cfg); !errors.Is(err, agent.ErrOtherAgent) {
			t.Errorf("want ErrOtherAgent, got %v", err)
		}
	}
	r.wants("tcp", http80, one+":8080")
}

func TestRunRefuses(t *testing.T) {
	client := fake.NewClientset()
	for want, cfg := range map[string]agent.Config{
		"no client":                             {NodeName: thisNode, Cgroup: "/"},
		"no node name":                          {Client: client, Cgroup: "/"},
		"no cgroup and no devices":              {Client: client, NodeName: thisNode},
		`devices "[": syntax error in pattern`:  {Client: client, NodeName: thisNode, Devices: []string{"["}},
		`"Guess" is not one of [ClusterCIDR`:    {Client: client, NodeName: thisNode, Devices: []string{"*"}, Local: agent.Local{Mode: "Guess"}},
		"not a folder of a cgroup2 file system": {Client: client, NodeName: thisNode, Cgroup: t.TempDir()},
	} {
		if err := agent.Run(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q, got %v", want, err)
		}
	}
}
