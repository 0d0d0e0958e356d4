// SPDX-License-Identifier: Apache-2.0

package fleet

import (
	"context"
	"fmt"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes"
	"k8s.io/utils/ptr"
)

// apiWriters is how many requests are under way at once.
const apiWriters = 32

// apiWriter writes Services and slices through the API server, which makes and removes their IPAddresses. It allocates each address by a list of all: its time grows with the square of
// the number of Services (facts: 420 Services/s at the beginning, 230 at 10,000).
type apiWriter struct {
	client kubernetes.Interface
	plan   Plan
}

var _ writer = (*apiWriter)(nil)

func (w *apiWriter) create(ctx context.Context, batch [kinds][]Service, wrote func(int)) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(apiWriters)
	for _, s := range batch[kindSlice] {
		group.Go(func() error {
			_, err := w.client.DiscoveryV1().EndpointSlices(w.plan.Namespace).Create(ctx, newSlice(w.plan, s), metav1.CreateOptions{})
			return w.done("create", kindSlice, s.Name, err, wrote)
		})
	}
	for _, s := range batch[kindService] {
		group.Go(func() error {
			_, err := w.client.CoreV1().Services(w.plan.Namespace).Create(ctx, newService(w.plan, s), metav1.CreateOptions{})
			return w.done("create", kindService, s.Name, err, wrote)
		})
	}
	return group.Wait()
}

func (w *apiWriter) remove(ctx context.Context, batch [kinds][]entry, wrote func(int)) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(apiWriters)
	for _, e := range batch[kindSlice] {
		group.Go(func() error {
			err := w.client.DiscoveryV1().EndpointSlices(w.plan.Namespace).Delete(ctx, e.name, metav1.DeleteOptions{})
			return w.done("delete", kindSlice, e.name, err, wrote)
		})
	}
	for _, e := range batch[kindService] {
		group.Go(func() error {
			err := w.client.CoreV1().Services(w.plan.Namespace).Delete(ctx, e.name, metav1.DeleteOptions{})
			return w.done("delete", kindService, e.name, err, wrote)
		})
	}
	return group.Wait()
}

func (w *apiWriter) update(ctx context.Context, s Service) error {
	slices := w.client.DiscoveryV1().EndpointSlices(w.plan.Namespace)
	slice, err := slices.Get(ctx, s.Name, metav1.GetOptions{})
	if err == nil {
		slice.Endpoints = newEndpoints(s)
		_, err = slices.Update(ctx, slice, metav1.UpdateOptions{})
	}
	return w.done("update", kindSlice, s.Name, err, func(int) {})
}

// done counts a request or names what failed. What somebody else deleted first is deleted.
func (w *apiWriter) done(verb string, k kind, name string, err error, wrote func(int)) error {
	if err != nil && !(verb == "delete" && apierrors.IsNotFound(err)) {
		return fmt.Errorf("%s %s of %s/%s: %w", verb, k, w.plan.Namespace, name, err)
	}
	wrote(1)
	return nil
}

// newService is a Service as an administrator would write it; the API server fills in the rest. Without a valid address the
// API server chooses one.
func newService(p Plan, s Service) *corev1.Service {
	service := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: p.Namespace, Name: s.Name},
		Spec: corev1.ServiceSpec{
			Ports: []corev1.ServicePort{{Port: p.Port, TargetPort: intstr.FromInt32(p.TargetPort)}},
		},
	}
	if s.Address.Addr().IsValid() {
		service.Spec.ClusterIP = s.Address.Addr().String()
	}
	return service
}

// newSlice is the slice of s as a controller would write it. It has the Service's name.
func newSlice(p Plan, s Service) *discoveryv1.EndpointSlice {
	return &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: p.Namespace, Name: s.Name, Labels: newLabels(s)},
		AddressType: discoveryv1.AddressTypeIPv4,
		Endpoints:   newEndpoints(s),
		Ports:       []discoveryv1.EndpointPort{{Name: ptr.To(""), Port: ptr.To(p.TargetPort), Protocol: ptr.To(corev1.ProtocolTCP)}},
	}
}

func newLabels(s Service) map[string]string {
	return map[string]string{discoveryv1.LabelServiceName: s.Name, discoveryv1.LabelManagedBy: "plimsoll"}
}

// newEndpoints are the backends of s, all ready.
func newEndpoints(s Service) []discoveryv1.Endpoint {
	endpoints := make([]discoveryv1.Endpoint, len(s.Backends))
	for e, backend := range s.Backends {
		endpoints[e] = discoveryv1.Endpoint{
			Addresses:  []string{backend.Addr().String()},
			Conditions: discoveryv1.EndpointConditions{Ready: ptr.To(true), Serving: ptr.To(true), Terminating: ptr.To(false)},
		}
	}
	return endpoints
}
