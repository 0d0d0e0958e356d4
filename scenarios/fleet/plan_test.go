// SPDX-License-Identifier: Apache-2.0

package fleet

import (
	"net/netip"
	"strings"
	"testing"
)

func labPlan() Plan {
	return Plan{
		Namespace: "fleet",
		Endpoints: 2,
		Port:      80, TargetPort: 8080,
		EndpointPrefixes: []netip.Prefix{netip.MustParsePrefix("198.18.64.0/18"), netip.MustParsePrefix("198.18.128.0/18")},
		ServiceCIDR:      netip.MustParsePrefix("198.19.0.0/16"),
		Seed:             1,
	}
}

func TestEndpointAddresses(t *testing.T) {
	one := []netip.Prefix{netip.MustParsePrefix("10.0.0.7/32")}
	for _, test := range []struct {
		name      string
		endpoints int
		prefixes  []netip.Prefix
		service   int
		want      string
	}{
		{"first", 2, nil, 0, "198.18.65.0 198.18.129.0"},
		{"next has its own", 2, nil, 1, "198.18.65.1 198.18.129.1"},
		{"three on two pods", 3, nil, 1, "198.18.65.2 198.18.129.2 198.18.65.3"},
		{"the last before the broadcast address", 2, nil, 16126, "198.18.127.254 198.18.191.254"},
		{"around", 2, nil, 16127, "198.18.65.0 198.18.129.0"},
		{"a pod with one address", 2, one, 3, "10.0.0.7 10.0.0.7"},
		{"none", 0, nil, 3, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := labPlan()
			p.Endpoints = test.endpoints
			if test.prefixes != nil {
				p.EndpointPrefixes = test.prefixes
			}
			var got []string
			for _, b := range p.service(test.service, netip.Addr{}).Backends {
				if b.Port() != 8080 {
					t.Errorf("backend %s has not the target port", b)
				}
				got = append(got, b.Addr().String())
			}
			if got := strings.Join(got, " "); got != test.want {
				t.Errorf("got %s, want %s", got, test.want)
			}
		})
	}
}

func TestServiceAddresses(t *testing.T) {
	p := labPlan()
	if got, want := p.serviceAddr(0).String(), "198.19.1.0"; got != want {
		t.Errorf("first address %s, want %s", got, want)
	}
	if got, want := p.serviceAddr(p.serviceRoom()-1).String(), "198.19.255.254"; got != want {
		t.Errorf("last address %s, want %s", got, want)
	}
}

func TestPlanErrors(t *testing.T) {
	for _, test := range []struct {
		want   string
		change func(*Plan)
	}{
		{"no namespace", func(p *Plan) { p.Namespace = "" }},
		{"endpoints a Service", func(p *Plan) { p.Endpoints = 1001 }},
		{"endpoints a Service", func(p *Plan) { p.Endpoints = -1 }},
		{"no range of addresses", func(p *Plan) { p.EndpointPrefixes = nil }},
		{"port 0", func(p *Plan) { p.Port = 0 }},
		{"target port 65536", func(p *Plan) { p.TargetPort = 65536 }},
		{"Service range", func(p *Plan) { p.ServiceCIDR = netip.Prefix{} }},
		{"Service range", func(p *Plan) { p.ServiceCIDR = netip.MustParsePrefix("fd00::/112") }},
		{"endpoint range", func(p *Plan) { p.EndpointPrefixes[1] = netip.MustParsePrefix("fd00::/112") }},
	} {
		p := labPlan()
		test.change(&p)
		if err := p.validate(); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("error = %v, want %q", err, test.want)
		}
	}
	if err := labPlan().validate(); err != nil {
		t.Error(err)
	}
}
