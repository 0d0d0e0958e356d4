// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/plimsoll-bench/plimsoll/dataplane/agent"
	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
	"github.com/plimsoll-bench/plimsoll/dataplane/lb/lbtest"
)

// A Service of type LoadBalancer is reached at each of its addresses from inside the cluster, by the endpoints of its cluster policy
// whatever the external one is, and only there.
func TestExternalAddresses(t *testing.T) {
	const external, ingress, hostname, proxied = "192.0.2.1", "192.0.2.2", "lb.example", "192.0.2.3"
	proxy := v1.LoadBalancerIPModeProxy
	exposed := func(change func(*v1.Service)) *v1.Service {
		http := port("http", v1.ProtocolTCP, 80)
		http.NodePort = 30080
		return service(func(s *v1.Service) {
			s.Spec.Type, s.Spec.ExternalTrafficPolicy = v1.ServiceTypeLoadBalancer, v1.ServiceExternalTrafficPolicyLocal
			s.Spec.HealthCheckNodePort = 30999
			s.Spec.ExternalIPs = []string{external}
			s.Status.LoadBalancer.Ingress = []v1.LoadBalancerIngress{{IP: ingress}, {Hostname: hostname}, {IP: proxied, IPMode: &proxy}, {IP: "127.0.0.9"}, {IP: "0.0.0.0"}}
			if change != nil {
				change(s)
			}
		}, http)
	}
	r := startRig(t, lb.Options{}, exposed(nil),
		slice("web-1", "http", v1.ProtocolTCP, endpoint(one, thisNode), endpoint(two, otherNode)))
	for _, address := range []string{http80, external + ":80", ingress + ":80", nodeAddress + ":30080"} {
		r.wants("tcp", address, one+":8080", two+":8080")
	}
	for _, address := range []string{proxied + ":80", "10.1.1.1:30080", external + ":30080", nodeAddress + ":80"} {
		r.wantsError("tcp", address, unix.ENETUNREACH)
	}
	// A pod's own loopback is its own.
	r.wantsError("tcp", "127.0.0.9:80", unix.ECONNREFUSED)
	if code, text := r.get(r.health, "/healthz"); code != http.StatusOK {
		t.Errorf("healthz with a load balancer at no host's address: %d %s", code, text)
	}
	// The load balancer is to send here what has an endpoint here.
	health := "127.0.0.1:30999"
	r.wantsHealth(health, http.StatusOK, 1)
	// With no endpoint here these are used still, and with none at all it is refused.
	r.updateSlice(slice("web-1", "http", v1.ProtocolTCP, endpoint(two, otherNode)))
	r.wantsHealth(health, http.StatusServiceUnavailable, 0)
	for _, address := range []string{external + ":80", ingress + ":80", nodeAddress + ":30080"} {
		r.wants("tcp", address, two+":8080")
	}
	r.updateSlice(slice("web-1", "http", v1.ProtocolTCP))
	for _, address := range []string{external + ":80", ingress + ":80", nodeAddress + ":30080"} {
		r.wantsError("tcp", address, unix.ECONNREFUSED)
	}
	r.updateSlice(slice("web-1", "http", v1.ProtocolTCP, endpoint(two, otherNode)))
	r.wants("tcp", ingress+":80", two+":8080")

	// The internal policy is the ClusterIP's alone.
	local := v1.ServiceInternalTrafficPolicyLocal
	r.updateService(exposed(func(s *v1.Service) { s.Spec.InternalTrafficPolicy = &local }))
	r.wantsError("tcp", http80, unix.ENETUNREACH)
	r.wants("tcp", external+":80", two+":8080")

	// Source ranges are for the load balancer's address, and everybody may be in them.
	r.updateService(exposed(func(s *v1.Service) { s.Spec.LoadBalancerSourceRanges = []string{" 10.0.0.0/8 "} }))
	r.wantsError("tcp", ingress+":80", unix.ENETUNREACH)
	r.wants("tcp", external+":80", two+":8080")
	r.wants("tcp", nodeAddress+":30080", two+":8080")
	r.updateService(exposed(func(s *v1.Service) { s.Spec.LoadBalancerSourceRanges = []string{"10.0.0.0/8", "0.0.0.0/0"} }))
	r.wants("tcp", ingress+":80", two+":8080")

	moved := node(thisNode)
	moved.Status.Addresses[0].Address = "10.0.0.2"
	if _, err := r.client.CoreV1().Nodes().Update(r.Context(), moved, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	r.wants("tcp", "10.0.0.2:30080", two+":8080")
	r.wantsError("tcp", nodeAddress+":30080", unix.ENETUNREACH)

	r.updateService(service(nil, port("http", v1.ProtocolTCP, 80)))
	r.wantsHealth(health, 0, 0)
	for _, address := range []string{external + ":80", ingress + ":80", "10.0.0.2:30080"} {
		r.wantsError("tcp", address, unix.ENETUNREACH)
	}
	r.wants("tcp", http80, two+":8080")
}

// A client keeps its endpoint at all addresses of a port, while that is eligible.
func TestSessionAffinity(t *testing.T) {
	const external = "192.0.2.1"
	seconds := int32(10800)
	sticky := service(func(s *v1.Service) {
		s.Spec.ExternalIPs = []string{external}
		s.Spec.SessionAffinity = v1.ServiceAffinityClientIP
		s.Spec.SessionAffinityConfig = &v1.SessionAffinityConfig{ClientIP: &v1.ClientIPConfig{TimeoutSeconds: &seconds}}
	}, port("http", v1.ProtocolTCP, 80))
	r := startRig(t, lb.Options{}, sticky, slice("web-1", "http", v1.ProtocolTCP, endpoint(one, thisNode), endpoint(two, otherNode)))
	chosen := func() string {
		var got lbtest.Outcome
		r.eventually(func() bool {
			got = r.pod.Connect(t, "tcp", http80, 20)
			return len(got.Answers) == 1 && len(got.Errors) == 0
		}, func() string { return fmt.Sprintf("want one endpoint to answer, got %+v", got) })
		return slices.Collect(maps.Keys(got.Answers))[0]
	}
	first := chosen()
	r.wants("tcp", external+":80", first)

	other := map[string]string{one + ":8080": two, two + ":8080": one}[first]
	r.updateSlice(slice("web-1", "http", v1.ProtocolTCP, endpoint(other, thisNode)))
	r.wants("tcp", http80, other+":8080")
	r.updateSlice(slice("web-1", "http", v1.ProtocolTCP, endpoint(one, thisNode), endpoint(two, thisNode)))
	r.wants("tcp", external+":80", other+":8080")
	r.wants("tcp", http80, other+":8080")
	r.updateService(service(nil, port("http", v1.ProtocolTCP, 80)))
	r.wants("tcp", http80, one+":8080", two+":8080")
}

// Of Services that want the same address the first by name has it, whatever came first; when it goes, the next has it.
func TestContestedAddress(t *testing.T) {
	const external = "192.0.2.1"
	contender := func(name, clusterIP, backend string) (*v1.Service, *discovery.EndpointSlice) {
		s := service(func(s *v1.Service) {
			s.Name, s.Spec.ClusterIP, s.Spec.ClusterIPs, s.Spec.ExternalIPs = name, clusterIP, []string{clusterIP}, []string{external}
		}, port("http", v1.ProtocolTCP, 80))
		e := slice(name+"-1", "http", v1.ProtocolTCP, endpoint(backend, thisNode))
		e.Labels[discovery.LabelServiceName] = name
		return s, e
	}
	lines := agent.StartLogs(t)
	b, ofB := contender("b", "10.96.0.12", two)
	a, ofA := contender("a", "10.96.0.11", one)
	r := startRig(t, lb.Options{}, b, ofB)
	r.wants("tcp", external+":80", two+":8080")
	// That one also wants the other's ClusterIP, and does not get it.
	a.Spec.ExternalIPs = append(a.Spec.ExternalIPs, "10.96.0.12")
	r.create(a, ofA)
	r.wants("tcp", external+":80", one+":8080")
	r.wants("tcp", "10.96.0.12:80", two+":8080")
	if text := lines.String(); !strings.Contains(text, `servicePort="default/a:http" others=["default/b:http"]`) {
		t.Errorf("the log does not name both Services: %s", text)
	}
	if _, text := r.get(r.metric, "/metrics"); !strings.Contains(text, `plimsoll_lb_contested_frontends{ip_family="IPv4"} 2`) {
		t.Errorf("no contested frontend is counted")
	}
	if err := r.client.CoreV1().Services("default").Delete(r.Context(), "a", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	r.wants("tcp", external+":80", two+":8080")
}

// An address that no Service can be at is ignored, which is said once and counted; the Service's others are served.
func TestIgnoredAddresses(t *testing.T) {
	lines := agent.StartLogs(t)
	const good = "192.0.2.1"
	bad := []string{"127.0.0.9", "0.0.0.0", "169.254.1.1", "not one", "fd00::1"} // the last one without a ClusterIP of IPv6
	odd := func(externals ...string) *v1.Service {
		return service(func(s *v1.Service) { s.Spec.ExternalIPs = externals }, port("http", v1.ProtocolTCP, 80))
	}
	r := startRig(t, lb.Options{}, odd(append([]string{good}, bad...)...), slice("web-1", "http", v1.ProtocolTCP, endpoint(one, thisNode)))
	counted := func(ipv4, ipv6 int) {
		t.Helper()
		var text string
		r.eventually(func() bool {
			_, text = r.get(r.metric, "/metrics")
			return strings.Contains(text, fmt.Sprintf("\nplimsoll_lb_ignored_addresses{ip_family=\"IPv4\"} %d\n", ipv4)) &&
				strings.Contains(text, fmt.Sprintf("\nplimsoll_lb_ignored_addresses{ip_family=\"IPv6\"} %d\n", ipv6))
		}, func() string { return text })
	}
	r.wants("tcp", good+":80", one+":8080")
	r.wants("tcp", http80, one+":8080")
	counted(4, 1)
	if _, text := r.get(r.metric, "/status"); !strings.Contains(text, "IPv4: 4 addresses of Services cannot be served (see the log)") {
		t.Errorf("status does not tell: %s", text)
	}
	r.updateService(odd(bad...))
	r.wantsError("tcp", good+":80", unix.ENETUNREACH)
	for _, address := range bad {
		line := fmt.Sprintf(`"Address of a Service ignored" service="default/web" address="%s"`, address)
		if n := lines.Count(line); n != 1 {
			t.Errorf("%q is in the log %d times:\n%s", line, n, lines)
		}
	}
	if code, text := r.get(r.health, "/healthz"); code != http.StatusOK {
		t.Errorf("healthz: %d %s", code, text)
	}
	r.updateService(odd())
	counted(0, 0)
}
